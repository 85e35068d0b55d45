"""Merging a LoRA into its network, and how much of it survives in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from srpo.models.peft_layers import lora_layers, remove_lora


def surviving_share(network: torch.nn.Module, dtype: torch.dtype) -> float:
    """Return how much of the change that the active LoRA makes would survive in weights of this dtype.

    A change smaller than half the distance between neighboring numbers vanishes, or becomes too large by chance. The
    share is 1 - |r - c|^2 / |c|^2, at least 0, of the rounded change r and the exact change c of all weights: 1 is all
    of it. The network stays as it is.
    """
    return share_of_changes(_changes(network), dtype)


def share_of_changes(changes: Iterable[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> float:
    """Return the share of `surviving_share`, from float32 weights without and with the change."""
    lost = 0.0
    total = 0.0
    for original, weight in changes:
        change = weight - original
        rounded = weight.to(dtype).float() - original.to(dtype).float()
        lost += float((rounded - change).square().sum(dtype=torch.float64))
        total += float(change.square().sum(dtype=torch.float64))
    return max(0.0, 1 - lost / total) if total else 1.0


def _changes(network: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each weight without and with the active LoRA."""
    for layer, name in _merged_one_by_one(network):
        weight = layer.get_base_layer().weight
        original = weight.data.clone()
        layer.merge(adapter_names=[name])
        yield original, weight.data
        weight.data = original
        layer.merged_adapters.clear()


def merge_lora(network: torch.nn.Module) -> None:
    """Merge the active LoRA in float32, round once to the weights' dtype, and remove the LoRA's layers."""
    for layer, name in _merged_one_by_one(network):
        layer.merge(adapter_names=[name])
    remove_lora(network)


def _merged_one_by_one(network: torch.nn.Module) -> Iterator[tuple[BaseTunerLayer, str]]:
    """Yield each layer with a LoRA and the LoRA's name, with the layer's own weight in float32 for that time."""
    for layer in lora_layers(network):
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        for name in layer.active_adapters:
            yield layer, name
        weight.data = weight.data.to(dtype)
