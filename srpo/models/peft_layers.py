"""LoRA as layers of PEFT beside a network's weights: adding, filling, reading, choosing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from srpo.errors import one_line

State = Mapping[str, torch.Tensor]


def lora_layers(network: torch.nn.Module) -> Iterator[BaseTunerLayer]:
    """Yield the layers that have a LoRA."""
    return (layer for layer in network.modules() if isinstance(layer, BaseTunerLayer))


def add_lora(network: torch.nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Add a LoRA that changes nothing yet, in float32, and make it the active one.

    PEFT draws its A matrices from the global generator.

    Raises:
        ValueError: the network lacks a module that the configuration names, or it can't have LoRA.
    """
    with warnings.catch_warnings():  # PEFT warns of a second LoRA, which is intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, name)
    use_lora(network, name)
    for parameter_name, parameter in network.named_parameters():
        if f".{name}" in parameter_name and "lora_" in parameter_name:
            parameter.data = parameter.data.float()


def fill_lora(network: torch.nn.Module, state: State, name: str = "default") -> None:
    """Give a LoRA these weights.

    Raises:
        ValueError: they are of another rank or of other modules.
    """
    try:
        result = set_peft_model_state_dict(network, dict(state), adapter_name=name)
    except RuntimeError as error:
        raise ValueError(one_line(error)) from None
    if result.unexpected_keys or len(lora_state(network, name)) != len(state):
        raise ValueError("other modules")


def lora_state(network: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the weights of a LoRA by PEFT's names."""
    return get_peft_model_state_dict(network, adapter_name=name)


def attach_lora(network: torch.nn.Module, state: State) -> None:
    """Add the LoRA with these weights, at a scale of 1, to a network without one.

    Raises:
        ValueError: they don't fit the network.
    """
    downs = {name: value for name, value in state.items() if name.endswith(".lora_A.weight")}
    if not downs:
        raise ValueError("it holds no LoRA")
    rank = len(next(iter(downs.values())))
    modules = [name.removesuffix(".lora_A.weight") for name in downs]
    use_dora = any(name.endswith(".lora_magnitude_vector") for name in state)
    add_lora(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, use_dora=use_dora))
    fill_lora(network, state)


def use_lora(network: torch.nn.Module, name: str | None) -> None:
    """Make a LoRA the only active one, whose weights require gradients; None deactivates all."""
    for layer in lora_layers(network):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)


def remove_lora(network: torch.nn.Module) -> None:
    """Remove the layers of PEFT, with what is not merged."""
    recurse_remove_peft_layers(network)
    del network.peft_config
