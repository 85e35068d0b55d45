"""PickScore: a CLIP-H fine-tuned on half a million human choices between two images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srpo.rewards.clip import ClipReward
from srpo.rewards.protocol import Pixels


class PickScore(ClipReward):
    """exp(logit_scale) * cosine(image, text) (Kirstain et al., 2023, Pick-a-Pic).

    Units: logits; the difference of two images of one prompt is the log odds of people picking the first. With
    the published weights a scale of 100, and 18 to 24 for most images; 0.5 apart is a clear preference.
    Preprocessing: the checkpoint's (shortest side to 224 bicubic, center crop, OpenAI's mean and standard deviation).
    Source: `yuvalkirstain/PickScore_v1`, whose repository carries the processor of
    `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` too. License: MIT (the code repository; the model card names none).
    """

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the logit of image i for prompt i, float32 [n]."""
        return self.encoder.logit_scale * self.encoder.cosine(images, prompts)
