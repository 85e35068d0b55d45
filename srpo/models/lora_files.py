"""LoRA files as people share them: diffusers', PEFT's and kohya's names, alpha, DoRA, text encoders, convolutions.

A layer is applied to the weight W that it was made for. With the change c = alpha / rank * up @ down, W becomes
W + scale * c; with DoRA (Liu et al., 2024, arXiv:2402.09353) W + scale * (m * (W + c) / |W + c| - W), where m are the
magnitudes, and the norm is over each output (or, where the file has one magnitude per input, over each input).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from srpo.errors import UserError, user_error
from srpo.models.original_layout import original_unet_name

# name of the layer, then how each program names its parts
PART = re.compile(
    r"(?P<layer>.+?)(?:\.lora|_lora|\.lora_linear_layer)?"
    r"\.(?P<part>lora_down|lora_up|lora_mid|lora_A|lora_B|down|up|alpha|dora_scale|lora_magnitude_vector)(?:\.weight)?"
)
PARTS = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", "lora_mid": "mid"}
PARTS |= {"lora_magnitude_vector": "magnitude"}
NETWORKS = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
}  # fmt: skip
METADATA = "lora_adapter_metadata"  # diffusers' copy of PEFT's LoraConfig
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", ".diff": "full differences"}


@dataclass
class LoraLayer:
    """One layer of a LoRA.

    Attributes:
        down: [rank, inputs] or of a convolution [rank, inputs, height, width].
        up: [outputs, rank] or [outputs, rank, 1, 1].
        mid: the core of a convolution in Tucker form [rank, rank, height, width], else None.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        magnitude: DoRA's, one per output, or with `per_input` one per input; None without.
    """

    down: torch.Tensor
    up: torch.Tensor
    mid: torch.Tensor | None
    scale: float
    magnitude: torch.Tensor | None
    per_input: bool = False

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.down.shape[0]

    def apply(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the weight with this layer in it at a scale, in float32.

        Raises:
            RuntimeError: the shapes do not fit.
        """
        weight = weight.float()
        down = self.down.float().flatten(1)
        if self.mid is not None:
            down = torch.einsum("orkl,ri->oikl", self.mid.float(), down).flatten(1)
        change = (self.scale * (self.up.float().flatten(1) @ down)).reshape(weight.shape)
        if self.magnitude is None:
            return weight + scale * change
        sum_ = weight + change
        kept = 1 if self.per_input else 0
        others = [axis for axis in range(weight.ndim) if axis != kept]
        norm = torch.linalg.vector_norm(sum_, dim=others, keepdim=True)
        return weight + scale * (self.magnitude.float().view(norm.shape) * sum_ / norm - weight)


def read_lora(key: str, file: Path, networks: Mapping[str, torch.nn.Module | None]) -> dict[str, dict[str, LoraLayer]]:
    """Return a LoRA's layers by network and module.

    Args:
        key: of params.yaml, for messages.
        networks: unet, text_encoder, text_encoder_2; layers of those that are None are left out.

    Raises:
        UserError: the file is damaged, is of another kind, or has layers that the networks lack.
    """
    with user_error(f"{key}: can't read {file}"):
        tensors = load_file(file)
        with safe_open(file, "pt") as header:
            metadata = json.loads((header.metadata() or {}).get(METADATA, "{}"))
    places = {name: _places(name, network) for name, network in networks.items() if network is not None}
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {name: {} for name in places}
    for name, tensor in tensors.items():
        if kind := next((kind for mark, kind in OTHER_KINDS.items() if mark in name), None):
            raise UserError(f"{key}: {file} holds {kind}, not LoRA layers; only LoRA, LoCon and DoRA are supported")
        network, layer, part = _split(key, file, name)
        if network not in places:
            if network in networks:
                continue
            raise UserError(f"{key}: {file} has a layer of the {network}, {name}; only model.loras takes it")
        if layer not in places[network]:
            raise UserError(f"{key}: {file} has a layer {name} that the base's {network} lacks; take a LoRA of SDXL")
        parts[network].setdefault(places[network][layer], {})[part] = tensor
    return {network: dict(_layers(key, file, network, found, metadata)) for network, found in parts.items() if found}


def _split(key: str, file: Path, name: str) -> tuple[str, str, str]:
    """Return network, layer as the file names it, and part of a tensor's name."""
    prefix = next((prefix for prefix in NETWORKS if name.startswith(prefix)), "")
    found = PART.fullmatch(name.removeprefix(prefix).removeprefix("base_model.model."))
    if not found:
        raise UserError(f"{key}: {file} holds {name}, which is no part of a LoRA; take another file")
    layer = found["layer"].replace(".processor.", ".")
    if layer.endswith(".to_out"):  # in names of older versions of diffusers
        layer += ".0"
    return NETWORKS.get(prefix, "unet"), layer, PARTS.get(found["part"], found["part"])


def _places(network: str, model: torch.nn.Module) -> dict[str, str]:
    """Return the modules with a weight by all names that LoRA files have for them."""
    places = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        aliases = [name]
        if network == "unet":
            aliases.append(original_unet_name(model, f"{name}.weight").removesuffix(".weight"))
        else:
            bare = name.removeprefix("text_model.")
            old = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.to_\1", bare)
            old = old.replace("self_attn.out_proj", "self_attn.to_out.0")
            aliases += [prefix + alias for alias in (bare, old) for prefix in ("", "text_model.")]
        for alias in aliases:
            places[alias] = places[alias.replace(".", "_")] = name
    return places


def _layers(
    key: str, file: Path, network: str, found: Mapping[str, Mapping[str, torch.Tensor]], metadata: Mapping[str, Any]
) -> Iterator[tuple[str, LoraLayer]]:
    for module, parts in found.items():
        if "down" not in parts or "up" not in parts:
            raise UserError(
                f"{key}: {file} holds only a part of the layer {module} of the {network}; take another file"
            )
        rank = parts["down"].shape[0]
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(module, network, rank, metadata)
        root = math.sqrt(rank) if metadata.get(f"{network}.use_rslora") else rank
        magnitude = parts.get("magnitude", parts.get("dora_scale"))
        per_input = "dora_scale" in parts and len(parts["dora_scale"]) != len(parts["up"])
        yield module, LoraLayer(parts["down"], parts["up"], parts.get("mid"), alpha / root, magnitude, per_input)


def _alpha(module: str, network: str, rank: int, metadata: Mapping[str, Any]) -> float:
    for pattern, value in (metadata.get(f"{network}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(metadata.get(f"{network}.lora_alpha", rank))
