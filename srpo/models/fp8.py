"""Eight bits for the weights that a UNet has most of: the linear layers of its attention blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting

FP8 = torch.float8_e4m3fn


def round_to_fp8(unet: UNet2DConditionModel) -> None:
    """Round the weights to numbers that eight bits hold; their dtype stays."""
    for layer in layers(unet):
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(FP8).to(parameter.dtype)


def store_in_fp8(unet: UNet2DConditionModel) -> None:
    """Keep rounded weights in eight bits, and cast each layer's for the time that it computes.

    Predictions and gradients stay the same to the bit. LoRA beside the weights keeps its dtype.
    """
    dtype = unet.dtype
    for layer in layers(unet):
        # by the layer, since for a whole network diffusers also stops PEFT from casting LoRA's inputs
        apply_layerwise_casting(layer, FP8, dtype, skip_modules_pattern=None)


def layers(unet: UNet2DConditionModel) -> Iterator[torch.nn.Linear]:
    """Yield the linear layers of attention blocks, without those of a LoRA.

    Convolutions are left out: autograd would find their weights in eight bits in the backward pass.
    """
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attentions." in name and ".lora_" not in name:
            yield module
