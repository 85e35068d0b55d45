"""CLIP similarity of picture and prompt, for any checkpoint in transformers' CLIPModel layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPModel, CLIPProcessor

from srpo.errors import UserError
from srpo.rewards.base import Pixels


class ClipReward:
    """100 * cosine(image, text), as in CLIPScore (Hessel et al., 2021) but not clipped at zero.

    Range -100 to 100; 20 to 35 is usual for OpenAI's CLIP on matching pairs. Preprocessing is the
    checkpoint's own (resize, crop, normalise), done on tensors.
    """

    def __init__(self, model: str, revision: str | None, device: torch.device) -> None:
        """Load a Hub id or local folder.

        Raises:
            UserError: it can't be loaded.
        """
        try:
            self.model = CLIPModel.from_pretrained(model, revision=revision, use_safetensors=True, dtype=torch.float32)
            self.processor = CLIPProcessor.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"rewards: can't load {model!r} as a CLIP model: {reason:.200}") from None
        self.model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n]: 100 * cosine of image i and prompt i."""
        distinct = sorted(set(prompts))
        tokens = self.processor.tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
        texts = _pooled(self.model.get_text_features(**tokens.to(self.device)))
        texts = torch.nn.functional.normalize(texts, dim=-1)
        texts = texts[[distinct.index(prompt) for prompt in prompts]]
        pictures = torch.nn.functional.normalize(self._embed(images), dim=-1)
        return (100 * (pictures * texts).sum(dim=-1)).float().cpu()

    @torch.inference_mode()
    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim]: the projected image embeddings, not normalised."""
        return self._embed(images).float().cpu()

    def _embed(self, images: Pixels) -> torch.Tensor:
        prepared = self.processor.image_processor(images, return_tensors="pt", device=self.device)
        return _pooled(self.model.get_image_features(pixel_values=prepared["pixel_values"].to(self.device)))


def _pooled(output) -> torch.Tensor:
    # transformers 5 returns an object where 4 returned the tensor
    return getattr(output, "pooler_output", output)
