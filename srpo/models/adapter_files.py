"""The file of a LoRA that a round trained: diffusers' names, a scale of 1, float32.

Networks are `unet` and, if they were trained, `text_encoder` and `text_encoder_2`; their layers have PEFT's names here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from safetensors import safe_open
from safetensors.torch import load_file

from srpo.errors import user_error
from srpo.lineage.record import WEIGHTS_FILE, check_weights
from srpo.storage.hashing import file_digest

State = Mapping[str, torch.Tensor]
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TEXT_MODEL = "text_model."


def adapter_errors(file: Path) -> AbstractContextManager[None]:
    """Return a context in which any exception means that this file is no adapter of the base model: a UserError."""
    return user_error(f"{file}: not an adapter of this base model", "`dvc checkout` restores it")


def read_adapter_file(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return a LoRA's weights by network and PEFT's names.

    Raises:
        ValueError: it has layers of no network.
    """
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(file).items():
        network, _, rest = name.partition(".")
        if network not in NETWORKS:
            raise ValueError(f"it holds {name}, which is no layer of a UNet or text encoder")
        states.setdefault(network, {})[rest] = value
    return {network: _peft_names(network, state) for network, state in states.items()}


def write_adapter_file(folder: Path, states: Mapping[str, State]) -> None:
    """Write a LoRA's weights, by network and PEFT's names, at a scale of 1."""
    states = {network: _file_names(network, state) for network, state in states.items()}
    converted = {network: convert_state_dict_to_diffusers(state) for network, state in states.items()}
    if not any(".lora_A." in name for state in converted.values() for name in state):
        states = converted  # diffusers reads PEFT's names, too, but no mixture
    layers = {
        f"{network}_lora_layers": {name: value.float().cpu().contiguous() for name, value in state.items()}
        for network, state in states.items()
    }
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)


def text_lora_digest(folder: Path) -> str | None:
    """Return the sha256 of an adapter that changes the text encoders, or None.

    Raises:
        UserError: the file can't be read, or is not the one that the folder's lineage.json names.
    """
    file = folder / WEIGHTS_FILE
    if not file.exists():
        return None
    check_weights(folder)
    with adapter_errors(file), safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    return file_digest(file) if any(name.startswith("text_encoder") for name in names) else None


def for_modules(network: torch.nn.Module, state: State) -> dict[str, torch.Tensor]:
    """Return weights by the names of a network's modules; not all text encoders of transformers have a `text_model`."""
    prefix = "" if hasattr(network, "text_model") else TEXT_MODEL
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _peft_names(network: str, state: State) -> dict[str, torch.Tensor]:
    if network == "unet":
        return convert_unet_state_dict_to_peft(state)
    return convert_state_dict_to_peft(state, StateDictType.DIFFUSERS)


def _file_names(network: str, state: State) -> dict[str, torch.Tensor]:
    if network == "unet":
        return dict(state)
    return {TEXT_MODEL + name.removeprefix(TEXT_MODEL): value for name, value in state.items()}
