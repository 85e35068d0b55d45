"""An exact judge for data where every prompt has a known image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from srpo.data import parquet
from srpo.data.decoding import decode_images
from srpo.errors import UserError
from srpo.rewards.protocol import Pixels


class TemplateReward:
    """1.0 if the template nearest to the image has the image's prompt, else 0.0.

    Nearest is by squared pixel distance over all templates. The mean over many images is prompt accuracy.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Read the templates.

        Args:
            model: parquet file with columns image and prompt, one row per prompt.

        Raises:
            UserError: it can't be read.
        """
        if not Path(model).is_file():
            raise UserError(f"{model!r} is not a parquet file of templates")
        rows = list(parquet.read_rows(Path(model), ["image", "prompt"]))
        images = torch.from_numpy(decode_images(row["image"] for row in rows))
        self.templates = images.permute(0, 3, 1, 2).flatten(1).float().div(255).to(device)
        self.prompts = [row["prompt"] for row in rows]
        self.device = device

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return 1.0 where the nearest template has the prompt, else 0.0: float32 [n].

        Raises:
            UserError: a prompt without a template, or images of another size.
        """
        if unknown := sorted(set(prompts) - set(self.prompts)):
            raise UserError(
                f"no template for prompt {unknown[0]!r}; this judge knows only the prompts of its templates"
            )
        flat = images.to(self.device).flatten(1).float().div(255)
        if flat.shape[1] != self.templates.shape[1]:
            raise UserError("templates and images differ in size")
        nearest = torch.cdist(flat, self.templates).argmin(dim=1).tolist()
        return torch.tensor(
            [float(self.prompts[best] == prompt) for best, prompt in zip(nearest, prompts, strict=True)]
        )
