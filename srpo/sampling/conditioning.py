"""Text conditioning of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptEmbeds:
    """The text conditioning of n prompts: `tokens` [n, length, dim] and `pooled` [n, pooled_dim]."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows: Sequence[int]) -> PromptEmbeds:
        return PromptEmbeds(self.tokens[rows], self.pooled[rows])
