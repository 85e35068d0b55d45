"""The network of published FID numbers: clean-fid's InceptionV3 with clean-fid's resizing."""

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
    """2048 pool features of InceptionV3 on pictures resized to 299 x 299 (Parmar et al., 2022, mode `clean`)."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """Load the weights, downloading them the first time.

        Args:
            device: where it computes.
            folder: where the weights are kept; by default with torch.hub's.

        Raises:
            UserError: there are none and they can't be downloaded, or they can't be read.
        """
        folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
        self.weights = folder / WEIGHTS_FILE
        try:
            if not self.weights.exists():
                _download(folder)
            self.model = InceptionV3W(str(folder), download=False).to(device).eval()
        except (OSError, RuntimeError) as error:
            reason = one_line(error)
            raise UserError(
                f"evaluate.features: InceptionV3's weights can't be had ({reason:.120}); "
                f"bring {WEIGHTS_FILE} into {folder}, or name a judge with image features"
            ) from None
        self.resize, self.device = build_resizer("clean"), device

    @torch.inference_mode()
    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, 2048] on the CPU."""
        resized = np.stack([self.resize(image.permute(1, 2, 0).numpy()) for image in images])
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        return self.model(batch).float().cpu()


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        shutil.move(check_download_inception(partial), folder / WEIGHTS_FILE)
