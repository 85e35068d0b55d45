"""Pixels as PIL makes them, which is what every reward model was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srpo.rewards.preprocess import Preprocess
from tests.rewards import formulas

SIZES = [(1024, 1024), (768, 1152), (1216, 832), (333, 501), (224, 224), (100, 140), (224, 100)]


def noisy(height: int, width: int) -> np.ndarray:
    """Hard edges and noise: the worst case for a resize."""
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 3] = 255
    pixels[height // 2 :, width // 2 :] //= 8
    return pixels


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def allowed(side: int) -> int:
    """Two roundings add up where a image is enlarged."""
    return 1 if side >= 224 else 2


def off_by(found: torch.Tensor, expected: np.ndarray) -> int:
    assert found.dtype == torch.uint8 and found.shape == (1, 3, 224, 224)
    return int((found[0].permute(1, 2, 0).int() - torch.from_numpy(expected.copy()).int()).abs().max())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shortest_side_matches_pil(height: int, width: int) -> None:
    pixels, limit = noisy(height, width), allowed(min(height, width))
    assert off_by(Preprocess().pixels(tensor(pixels)), formulas.shortest_and_crop(pixels, 224, round)) <= limit
    floor = Preprocess(floor_crop=True)
    assert off_by(floor.pixels(tensor(pixels)), formulas.shortest_and_crop(pixels, 224, int)) <= limit


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_longest_side_matches_pil(height: int, width: int) -> None:
    pixels = noisy(height, width)
    found = Preprocess(resize="longest", crop=None).pixels(tensor(pixels))
    assert off_by(found, formulas.longest_and_pad(pixels, 224)) <= allowed(max(height, width))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_accelerator_path_matches_pil(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no uint8 kernel on a GPU; its way in floats runs on a CPU as well."""
    monkeypatch.setattr(Preprocess, "_resize", Preprocess._resize_as_floats)
    pixels = noisy(height, width)
    limit = allowed(min(height, width))
    assert off_by(Preprocess().pixels(tensor(pixels)), formulas.shortest_and_crop(pixels, 224, round)) <= limit


def test_normalization_and_dtype() -> None:
    pixels = noisy(224, 224)
    found = Preprocess()(tensor(pixels), torch.device("cpu"))
    assert torch.allclose(found, formulas.normalized([pixels]), atol=1e-5)
    assert Preprocess()(tensor(pixels), torch.device("cpu"), torch.float16).dtype == torch.float16


def test_batch_equals_single_images() -> None:
    batch = torch.cat([tensor(noisy(300, 420)).roll(shift, dims=-1) for shift in range(3)])
    together = Preprocess().pixels(batch)
    assert torch.equal(together, torch.cat([Preprocess().pixels(one[None]) for one in batch]))


def test_unknown_settings_are_refused() -> None:
    config = {"resample": 1, "size": {"shortest_edge": 224}}
    with pytest.raises(ValueError, match="resample 1"):
        Preprocess.from_config(config)
    with pytest.raises(ValueError, match="longest_edge"):
        Preprocess.from_config(config | {"resample": 3, "size": {"longest_edge": 224}})
