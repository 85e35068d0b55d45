"""ImageReward: a BLIP that reads image and prompt together, from its published checkpoint, with transformers' BLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from srpo.config.reward_families import BERT_TOKENIZER, FAMILIES
from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.convert import below, blip_text, blip_vision
from srpo.rewards.heads import load_head
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels

FAMILY = FAMILIES["imagereward"]
MAX_TOKENS = 35
MEAN = 0.16717362830052426
STD = 1.0333394966054072


class ImageReward:
    """(r - 0.1672) / 1.0333, where r is an MLP of BLIP-large's first output token (Xu et al., 2023).

    Units: standard deviations over the authors' training images: mean 0, most within -2 to 2. Only the first 35
    tokens of the prompt are read. Preprocessing: shortest side to 224 bicubic, center crop, OpenAI's mean and
    standard deviation. Source: `zai-org/ImageReward` (formerly THUDM), file ImageReward.pt; the package of that name,
    which does not import with current transformers, is not needed. License: Apache-2.0. It has no features for FID.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the checkpoint, and BERT's tokenizer from the same local folder, or from the Hub.

        Args:
            model: the .pt file, or a folder or Hub repository that holds it under its published name.

        Raises:
            UserError: one of the two can't be loaded.
        """
        source = Source(model, revision)
        state = load_state(source, FAMILY.file)
        with loading(source):
            self.vision = blip_vision(below(state, "blip.visual_encoder.")).to(device, dtype).eval()
            self.text = blip_text(below(state, "blip.text_encoder.")).to(device, dtype).eval()
            self.head = load_head(state, "mlp.").to(device)
        words = sibling_or_default(source, BERT_TOKENIZER.file, Source(*BERT_TOKENIZER[:2]))
        with loading(words):
            self.tokenizer = AutoTokenizer.from_pretrained(
                words.model, revision=words.revision, trust_remote_code=False
            )
        side = (self.vision.config.image_size,) * 2
        self.preprocess = Preprocess(size=side, crop=side)
        self.device = device
        self.dtype = dtype

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the reward of image i for prompt i, float32 [n]."""
        prepared = self.preprocess(images, self.device, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        output = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixel_values=prepared).last_hidden_state,
        ).last_hidden_state
        return ((self.head(output[:, 0].float()).squeeze(1) - MEAN) / STD).cpu()
