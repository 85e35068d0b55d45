"""InceptionV3 features for FID, with clean-fid's weights and resizing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer

from srpo.errors import UserError, one_line
from srpo.rewards.protocol import Pixels

WEIGHTS_FILE = "inception-2015-12-05.pt"


class InceptionFeatures:
    """2048 pool features of InceptionV3 on images resized to 299 x 299 (Parmar et al., 2022, mode `clean`)."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """Load the weights, downloading them the first time.

        Args:
            device: where it computes.
            folder: where the weights are stored; torch.hub's folder by default.

        Raises:
            UserError: the weights are missing and can't be downloaded, or can't be read.
        """
        folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
        self.weights = folder / WEIGHTS_FILE
        try:
            if not self.weights.exists():
                _download(folder)
            self.model = InceptionV3W(str(folder), download=False).to(device).eval()
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"evaluate.features: can't load InceptionV3's weights ({one_line(error):.120}); "
                f"copy {WEIGHTS_FILE} to {folder}, or name a judge with image features"
            ) from None
        self.resize = build_resizer("clean")
        self.device = device

    @torch.inference_mode()
    def features(self, images: Pixels) -> torch.Tensor:
        """Return float32 [n, 2048] on the CPU."""
        resized = np.stack([self.resize(image.permute(1, 2, 0).numpy()) for image in images])
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        return self.model(batch).float().cpu()


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        shutil.move(check_download_inception(partial), folder / WEIGHTS_FILE)
