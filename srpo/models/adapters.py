"""Adapters, the trained weights of a round, applied for sampling: a LoRA, or the whole UNet.

An adapter folder is in diffusers' layout: `pytorch_lora_weights.safetensors`, relative to the base model, or
`diffusion_pytorch_model.safetensors` with its config.json, in float32 so that small steps survive many rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, check_weights
from srpo.models.adapter_files import adapter_errors, for_modules, read_adapter_file
from srpo.models.merging import merge_lora, surviving_share
from srpo.models.peft_layers import attach_lora, lora_layers

log = logging.getLogger(__name__)

MIN_SURVIVING_SHARE = 0.95  # in bfloat16 that of a change by about .5 % of the weights


def with_adapter(
    unet: UNet2DConditionModel, folder: Path, *, stored_as: torch.dtype | None = None, beside: bool = False
) -> UNet2DConditionModel:
    """Return the UNet with an adapter applied, for sampling; a folder without weights (base's) changes nothing.

    A LoRA is merged, or stays beside the weights: see `apply_lora`.

    Args:
        stored_as: as in `apply_lora`, and `beside`.

    Raises:
        UserError: the weights are not those that the folder's lineage.json names, can't be read, or belong to another
            kind of UNet.
    """
    check_weights(folder)
    if (folder / UNET_FILE).exists():
        with adapter_errors(folder / UNET_FILE):
            return UNet2DConditionModel.from_pretrained(folder, torch_dtype=unet.dtype, use_safetensors=True)
    apply_lora({"unet": unet}, folder, stored_as=stored_as, beside=beside)
    return unet


def apply_lora(
    networks: Mapping[str, Any], folder: Path, *, stored_as: torch.dtype | None = None, beside: bool = False
) -> None:
    """Apply the LoRA of an adapter folder, if it has one, to those of the networks that it changes.

    It is merged. In 16 bits most of a small change would be lost by rounding; if less than MIN_SURVIVING_SHARE of it
    would survive, the LoRA stays beside the weights, as layers of PEFT.

    Args:
        networks: any of unet, text_encoder, text_encoder_2.
        stored_as: the dtype that merged weights are cast to later; merge always, and log how much will survive.
        beside: never merge, since the weights will be kept in eight bits.

    Raises:
        UserError: the LoRA can't be read or belongs to another kind of model.
    """
    file = folder / WEIGHTS_FILE
    if not file.exists():
        return
    with adapter_errors(file):
        states = read_adapter_file(file)
        if "unet" not in states:
            raise ValueError("it holds no LoRA of a UNet")
        changed = {name: network for name, network in networks.items() if name in states}
        for name, network in changed.items():
            attach_lora(network, for_modules(network, states[name]))
    for name, network in changed.items():
        if beside:
            _cast(network)
        else:
            _merge(network, str(folder) if name == "unet" else f"{folder} ({name})", stored_as)


def _merge(network: Any, what: str, stored_as: torch.dtype | None) -> None:
    dtype = stored_as or network.dtype
    if dtype == torch.float32:
        merge_lora(network)
        return
    share = surviving_share(network, dtype)
    name = str(dtype).removeprefix("torch.")
    if share >= MIN_SURVIVING_SHARE or stored_as:
        merge_lora(network)
        level, hint = logging.INFO, ""
        if share < MIN_SURVIVING_SHARE:
            level, hint = logging.WARNING, "; --dtype float32 keeps all of it"
        log.log(level, "%s: merged into %s weights; %.1f %% of its change survives%s", what, name, 100 * share, hint)
        return
    _cast(network)
    log.info(
        "%s: kept beside the weights; merged into %s only %.1f %% of its change would survive",
        *(what, name, 100 * share),
    )


def _cast(network: Any) -> None:
    """Give the LoRA beside a network's weights their dtype, in which it samples."""
    dtype = network.dtype
    for layer in lora_layers(network):
        layer.to(dtype)
