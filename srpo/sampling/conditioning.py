"""Text conditioning of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptEmbeds:
    """The text conditioning of n texts.

    Attributes:
        tokens: [n, length, dim].
        pooled: [n, pooled_dim].
        negatives: for each prompt the row of its negative prompt; if empty, the last row is every prompt's, by
            `Sampler.encode` the empty prompt.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    negatives: tuple[int, ...] = ()

    def __getitem__(self, rows: Sequence[int]) -> PromptEmbeds:
        return PromptEmbeds(self.tokens[rows], self.pooled[rows])

    def negative(self, rows: Sequence[int]) -> PromptEmbeds:
        """Return the conditioning of the negative prompts of these prompts."""
        return self[[self.negatives[row] if self.negatives else -1 for row in rows]]
