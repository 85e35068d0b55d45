"""Text conditioning of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch


class Conditioning(NamedTuple):
    """The text conditioning of n rows of a UNet's batch.

    Attributes:
        tokens: [n, length, dim].
        pooled: [n, pooled_dim].
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


def time_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return SDXL's size conditioning [1, 6]: original size, crop corner (0, 0), target size, in pixels."""
    return torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype)


@dataclass(frozen=True)
class PromptEmbeds:
    """The text conditioning of n texts, each encoded in one or more chunks.

    Attributes:
        tokens: [chunks of all texts, length, dim], those of the first text first.
        pooled: [n, pooled_dim].
        chunks: for each text the number of its chunks; if empty, each text has one.
        negatives: for each prompt the row of its negative prompt; if empty, the last row is every prompt's, by
            `Sampler.encode` the empty prompt.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    chunks: tuple[int, ...] = ()
    negatives: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """Return the conditioning of these texts; see `stacked`."""
        return stacked((self.text(row) for row in rows), self.pooled[list(rows)])

    def text(self, row: int) -> torch.Tensor:
        """Return the tokens of one text [its chunks * length, dim]."""
        row %= len(self)
        if not self.chunks:
            return self.tokens[row]
        start = self._starts[row]
        return self.tokens[start : start + self.chunks[row]].flatten(0, 1)

    def to(self, device: torch.device) -> PromptEmbeds:
        """Return these on a device."""
        return replace(self, tokens=self.tokens.to(device), pooled=self.pooled.to(device))

    def num_chunks(self, row: int) -> int:
        """Return the number of a text's chunks."""
        return self.chunks[row] if self.chunks else 1

    def negative_row(self, row: int) -> int:
        """Return the row of a prompt's negative prompt."""
        return self.negatives[row] if self.negatives else -1

    def negative(self, rows: Sequence[int]) -> Conditioning:
        """Return the conditioning of the negative prompts of these prompts."""
        return self[[self.negative_row(row) for row in rows]]

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Return the positions in `rows`, grouped by the lengths of the prompt and of its negative prompt."""
        groups: dict[tuple[int, int], list[int]] = {}
        for position, row in enumerate(rows):
            lengths = self.num_chunks(row), self.num_chunks(self.negative_row(row))
            groups.setdefault(lengths, []).append(position)
        return list(groups.values())

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self.chunks, initial=0))


def stacked(texts: Iterable[torch.Tensor], pooled: torch.Tensor) -> Conditioning:
    """Return the conditioning of texts [length, dim], which may differ in length.

    Shorter ones are repeated up to the least common multiple: attention to keys that all appear equally often is the
    same as to each once.
    """
    texts = list(texts)
    length = math.lcm(*(len(tokens) for tokens in texts))
    return Conditioning(torch.stack([tokens.repeat(length // len(tokens), 1) for tokens in texts]), pooled)
