"""clean-fid's path with a stand-in network: the real weights are not needed, and their absence is one line."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image

from srpo.errors import UserError
from srpo.evaluation import inception
from srpo.evaluation.inception import WEIGHTS_FILE, InceptionFeatures


class StandIn(torch.nn.Module):
    """In the layout of the real file: `layers` makes 2048 numbers of a normalized 299 x 299 image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3 * 64, 2048)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.jit.script(StandIn()).save(tmp_path / WEIGHTS_FILE)
    return tmp_path


def test_features_equal_clean_fids(weights: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 56, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    network = InceptionFeatures(torch.device("cpu"), weights)
    ours = network.features(torch.from_numpy(images).permute(0, 3, 1, 2))
    theirs = fid.get_folder_features(
        str(folder), network.model, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
    )
    assert ours.shape == (5, 2048) and ours.dtype == torch.float32
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)
    assert not np.allclose(ours[0], ours[1])


def test_download_is_atomic(weights: Path, tmp_path: Path, monkeypatch) -> None:
    def download(folder: str) -> str:
        target = Path(folder) / WEIGHTS_FILE
        target.write_bytes((weights / WEIGHTS_FILE).read_bytes())
        return str(target)

    monkeypatch.setattr(inception, "check_download_inception", download)
    InceptionFeatures(torch.device("cpu"), tmp_path / "new")
    assert [item.name for item in (tmp_path / "new").iterdir()] == [WEIGHTS_FILE]


def test_missing_weights(tmp_path: Path, monkeypatch) -> None:
    def unreachable(folder: str) -> str:
        raise URLError("no route to host")

    monkeypatch.setattr(inception, "check_download_inception", unreachable)
    with pytest.raises(UserError, match=r"^evaluate\.features: .*no route to host.*name a judge") as error:
        InceptionFeatures(torch.device("cpu"), tmp_path / "none")
    assert "\n" not in str(error.value)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"^evaluate\.features: ") as error:
        InceptionFeatures(torch.device("cpu"), tmp_path)
    assert "\n" not in str(error.value)
