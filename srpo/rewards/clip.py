"""CLIP similarity of picture and prompt, for any checkpoint in transformers' CLIPModel layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srpo.models.hub import Source
from srpo.rewards.clip_encoder import ClipTower
from srpo.rewards.protocol import Pixels


class ClipReward:
    """CLIPScore without its clipping at zero (Hessel et al., 2021): 100 * cosine(image, text).

    Units: hundredths of a cosine, -100 to 100; with OpenAI's ViT-L/14 a fitting prompt gives about 20 to 35.
    Preprocessing: the checkpoint's own settings (resize or not, crop or not, mean and spread), on tensors.
    Source: `openai/clip-vit-large-patch14` or any other CLIPModel checkpoint. Licence: OpenAI's code is MIT; its
    model card puts deployed use out of scope.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load a Hub id or local folder.

        Raises:
            UserError: it can't be loaded.
        """
        self.tower = ClipTower.load(Source(model, revision), device, dtype)

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n]: 100 * cosine of image i and prompt i."""
        return 100 * self.tower.cosine(images, prompts)

    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim]: the projected image embeddings, not normalised."""
        return self.tower.images(images).cpu()
