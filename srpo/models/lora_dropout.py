"""Dropout of LoRA's inputs whose masks belong to samples, not to batches.

PyTorch's own draws one mask per forward pass, so that a step would depend on the micro-batch, on the number of
processes and on how often a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srpo.storage.hashing import derive_seed


class LoraDropout:
    """The dropout layers of a model's LoRA.

    Attributes:
        seeds: one per sample of the batch that is next; in a text encoder each chunk of a sample has a row. They stay
            through its backward pass, since gradient checkpointing computes layers again. Without seeds nothing is
            dropped.
    """

    def __init__(self, model: torch.nn.Module, adapter: str) -> None:
        """Replace PEFT's dropout layers of this adapter."""
        self.seeds: Sequence[int] = ()
        number = 0
        for module in model.modules():
            layers = getattr(module, "lora_dropout", {})
            if adapter in layers and isinstance(layers[adapter], torch.nn.Dropout):
                layers[adapter] = _SampleDropout(self, layers[adapter].p, number)
                number += 1


class _SampleDropout(torch.nn.Module):
    def __init__(self, owner: LoraDropout, share: float, number: int) -> None:
        super().__init__()
        self._owner = owner
        self._share = share
        self._number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self._owner.seeds:
            return x
        generator = torch.Generator(x.device)
        shape = (len(x) // len(self._owner.seeds), *x.shape[1:])
        parts = []
        for seed in self._owner.seeds:
            generator.manual_seed(derive_seed(seed, self._number))
            parts.append(torch.rand(shape, generator=generator, device=x.device))
        kept = torch.cat(parts) >= self._share
        return x * kept / (1 - self._share)
