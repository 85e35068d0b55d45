"""Prompts that are encoded in each step, because their encoders are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from srpo.sampling.text_encoding import token_ids
from srpo.training.denoiser import TokenIds


class PromptTokens:
    """Tokens of n prompts and, as row n, of the empty prompt; what `StoredEmbeds` is for encoders that stay."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], *, chunked: bool) -> None:
        """Tokenize the prompts.

        Args:
            pipeline: with tokenizers and text encoders.
            chunked: read long prompts to their end.
        """
        self._device = pipeline.text_encoder.device
        self._zeroed = len(prompts) if pipeline.config.force_zeros_for_empty_prompt else None
        self._ids = [
            [torch.tensor(token_ids(tokenizer, text, chunked=chunked)) for text in (*prompts, "")]
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
        ]

    def __len__(self) -> int:
        return len(self._ids[0])

    def __getitem__(self, rows: Sequence[int]) -> TokenIds:
        """Return the tokens of these rows, which have equally many chunks, on the text encoders' device."""
        first, second = (torch.stack([ids[row] for row in rows]).to(self._device) for ids in self._ids)
        kept = torch.tensor([float(row != self._zeroed) for row in rows], device=self._device)
        return TokenIds(first, second, kept)

    def num_chunks(self, row: int) -> int:
        """Return the number of a prompt's chunks."""
        return len(self._ids[0][row])
