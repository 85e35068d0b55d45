"""HPSv2 and HPSv2.1: CLIP-H fine-tuned on human preferences, from their open_clip checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from srpo.config.reward_families import CLIP_H_TOKENIZER, FAMILIES
from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.clip import ClipEncoder, ClipReward
from srpo.rewards.convert import clip_from_open_clip
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels


class HpsV2(ClipReward):
    """cosine(image, text) (Wu et al., 2023, Human Preference Score v2).

    Units: a cosine; 0.25 to 0.30 for most images, a difference of 0.01 is a clear preference (the paper's tables show
    it times 100). Preprocessing: longest side to 224 bicubic, black padding to a square, OpenAI's mean and standard
    deviation; nothing is cropped. Source: `xswu/HPSv2`, file HPS_v2_compressed.pt. License: Apache-2.0.
    """

    FAMILY = FAMILIES["hpsv2"]

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the checkpoint, and its tokenizer from the same local folder, or from the Hub if that has none.

        Args:
            model: the .pt file, or a folder or Hub repository that holds it under its published name.

        Raises:
            UserError: one of the two can't be loaded.
        """
        source = Source(model, revision)
        state = load_state(source, self.FAMILY.file)
        with loading(source):
            nested: Any = state.get("state_dict", state)  # a training checkpoint holds them one level down
            clip = clip_from_open_clip(nested)
        words = sibling_or_default(source, "tokenizer_config.json", Source(*CLIP_H_TOKENIZER[:2]))
        with loading(words):
            tokenizer = AutoTokenizer.from_pretrained(words.model, revision=words.revision, trust_remote_code=False)
        side = (clip.config.vision_config.image_size,) * 2
        self.encoder = ClipEncoder(clip, tokenizer, Preprocess(side, "longest", crop=None), device, dtype)

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosine of image i and prompt i, float32 [n]."""
        return self.encoder.cosine(images, prompts)


class HpsV21(HpsV2):
    """HPSv2.1: as HPSv2, trained on more and better data.

    Units: a cosine; 0.24 to 0.33 for most images: a wider range than HPSv2's. Preprocessing and license are
    HPSv2's. Source: `xswu/HPSv2`, file HPS_v2.1_compressed.pt.
    """

    FAMILY = FAMILIES["hpsv2.1"]
