"""The model in training: a LoRA, or the whole UNet."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from srpo.config.schema import InitialLora, TrainParams
from srpo.errors import UserError, one_line
from srpo.lineage.checkpoint_files import lora_file
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, check_weights
from srpo.models.adapter_files import adapter_errors, for_modules, read_adapter_file, write_adapter_file
from srpo.models.adapters import with_adapter
from srpo.models.lora_dropout import LoraDropout
from srpo.models.lora_files import read_lora
from srpo.models.peft_layers import add_lora, fill_lora, lora_state, use_lora
from srpo.rounds import BASE, Round
from srpo.storage.hashing import file_digest
from srpo.training.denoiser import Denoiser

MAX_SHARD_SIZE = "1TB"  # lineage.json has the digest of one file, so weights are never split
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
REFERENCE = "reference"

States = Mapping[str, Mapping[str, torch.Tensor]]


class TextEncoders(NamedTuple):
    """SDXL's two text encoders."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection


class TrainableModel:
    """A model in training. Its trained parameters are those that require gradients, all float32."""

    denoiser: Denoiser
    dropout: LoraDropout | None = None

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: value for name, value in self.denoiser.named_parameters() if value.requires_grad}

    def reference(self) -> contextlib.AbstractContextManager[Denoiser]:
        """Give the model that training started from inside a `with` block, for predictions without gradients."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the adapter's weights, without lineage.json, into a folder."""
        raise NotImplementedError


class LoraModel(TrainableModel):
    """Networks whose own weights are frozen, with a LoRA in training."""

    def __init__(
        self, unet: UNet2DConditionModel, settings: TrainParams, seed: int, encoders: TextEncoders | None = None
    ) -> None:
        """Add a LoRA that changes nothing yet.

        Args:
            encoders: text encoders to train, too.

        Raises:
            UserError: `train.target_modules` names a module that the UNet lacks or that can't have LoRA.
        """
        self.denoiser = Denoiser(unet, *(encoders or ())).requires_grad_(False)
        self.dropout: LoraDropout | None = None
        self._has_reference = False
        alpha = settings.alpha or settings.rank
        self._scale = alpha / (math.sqrt(settings.rank) if settings.use_rslora else settings.rank)
        self._configs = {
            name: LoraConfig(
                r=settings.rank,
                lora_alpha=alpha,
                target_modules=list(settings.target_modules) if name == "unet" else _text_modules(name, network),
                use_rslora=settings.use_rslora,
                use_dora=settings.use_dora,
                lora_dropout=settings.lora_dropout,
            )
            for name, network in self._networks.items()
        }
        torch.manual_seed(seed)
        for name, network in self._networks.items():
            try:
                add_lora(network, self._configs[name])
            except ValueError as error:
                raise UserError(f"train.target_modules: {one_line(error):.200}") from None
        if settings.lora_dropout:
            self.dropout = LoraDropout(self.denoiser, "default")

    @property
    def _networks(self) -> dict[str, torch.nn.Module]:
        return dict(self.denoiser.named_children())

    def load(self, states: States, *, with_reference: bool) -> None:
        """Start from a LoRA.

        Args:
            states: its tensors by network and PEFT's names, at a scale of 1.
            with_reference: keep a frozen copy of it for `reference`.

        Raises:
            ValueError: it has another rank, or is of other networks or modules.
        """
        if states.keys() != self._networks.keys():
            raise ValueError("other networks")
        for name, network in self._networks.items():
            state = for_modules(network, states[name])
            state = {name: value / self._scale if ".lora_B." in name else value for name, value in state.items()}
            fill_lora(network, state)
            if with_reference:
                config = copy.copy(self._configs[name])
                config.lora_dropout = 0.0
                add_lora(network, config, REFERENCE)
                fill_lora(network, state, REFERENCE)
                use_lora(network, "default")
        self._has_reference = with_reference

    @contextlib.contextmanager
    def reference(self) -> Iterator[Denoiser]:
        """Give the networks with the LoRA that training started from, or without one."""
        for network in self._networks.values():
            use_lora(network, REFERENCE if self._has_reference else None)
        try:
            yield self.denoiser
        finally:
            for network in self._networks.values():
                use_lora(network, "default")

    def save(self, folder: Path) -> None:
        """Write the LoRA in diffusers' layout, at a scale of 1, so that readers of the file need no alpha."""
        states = {name: lora_state(network) for name, network in self._networks.items()}
        scaled = {
            name: {key: value.float() * (self._scale if ".lora_B." in key else 1) for key, value in state.items()}
            for name, state in states.items()
        }
        write_adapter_file(folder, scaled)


class FullModel(TrainableModel):
    """A float32 UNet with every weight in training."""

    def __init__(self, unet: UNet2DConditionModel, *, with_reference: bool, dtype: torch.dtype) -> None:
        """Keep a frozen copy in `dtype` for `reference`, if `with_reference`."""
        self.denoiser = Denoiser(unet).requires_grad_(True)
        self._reference = copy.deepcopy(self.denoiser).requires_grad_(False) if with_reference else None
        if self._reference is not None and dtype != unet.dtype:
            self._reference.to(dtype)

    @contextlib.contextmanager
    def reference(self) -> Iterator[Denoiser]:
        """Give the frozen copy."""
        assert self._reference is not None
        yield self._reference

    def save(self, folder: Path) -> None:
        """Write the UNet in diffusers' layout."""
        self.denoiser.unet.save_pretrained(folder, safe_serialization=True, max_shard_size=MAX_SHARD_SIZE)


def make_trainable(
    unet: UNet2DConditionModel,
    round: Round,
    *,
    with_reference: bool,
    dtype: torch.dtype,
    encoders: TextEncoders | None = None,
) -> TrainableModel:
    """Return the model of the round at the start of its training: with the parent's weights, or base's.

    Args:
        unet: base's; float32 for `method: full`.
        with_reference: keep what `reference` needs.
        dtype: compute dtype.
        encoders: base's, to train them, too.

    Raises:
        UserError: the parent's adapter is missing or does not fit.
    """
    settings = round.params.train
    parent = round.parent
    folder = round.parent_files.adapter if parent != BASE and settings.start == "parent" else None
    file = folder and folder / (UNET_FILE if settings.method == "full" else WEIGHTS_FILE)
    if file and not file.exists():
        raise UserError(f"{file}: missing; run train of round {parent} or `dvc checkout`")
    if settings.method == "full":
        device = unet.device
        start = with_adapter(unet, folder).to(device) if folder else unet
        return FullModel(start, with_reference=with_reference, dtype=dtype)
    states: States | None = None
    what = f"those of parent {parent}; keep them"
    if file and folder:
        check_weights(folder)
        with adapter_errors(file):
            states = read_adapter_file(file)
    elif settings.initial_lora:
        states = _initial_states(unet, encoders, settings.initial_lora)
        what = "those of train.initial_lora; set them to its own, or merge it with model.loras"
    model = LoraModel(unet, settings, round.params.seed, encoders)
    if states:
        try:
            model.load(states, with_reference=with_reference)
        except ValueError:
            keys = "rank, target_modules, use_dora or train_text_encoder"
            raise UserError(f"rounds.{round.key}.train: {keys} differ from {what}") from None
    return model


def _text_modules(name: str, encoder: torch.nn.Module) -> list[str]:
    """Return the attention's projections of those layers of a text encoder that SDXL reads."""
    names = (module for module, _ in encoder.named_modules())
    return [module for module in names if module.endswith(TEXT_MODULES) and not _is_unread(name, encoder, module)]


def _is_unread(name: str, network: Any, module: str) -> bool:
    """Return whether a module belongs to the last layer of the first text encoder, whose output SDXL does not read."""
    return name == "text_encoder" and f"encoder.layers.{network.config.num_hidden_layers - 1}." in module


def _initial_states(
    unet: UNet2DConditionModel, encoders: TextEncoders | None, lora: InitialLora
) -> dict[str, dict[str, torch.Tensor]]:
    """Return a LoRA file's tensors by network and PEFT's names, at a scale of 1.

    Raises:
        UserError: it is missing, of another kind, or another one than the sha256 says.
    """
    key = "train.initial_lora"
    file = lora_file(key, Path(), lora.path)
    if (found := file_digest(file)) != lora.sha256:
        raise UserError(f"{key}.sha256: that of {lora.path} is {found}; set it, if this is the file you mean")
    states: dict[str, dict[str, torch.Tensor]] = {}
    networks: dict[str, torch.nn.Module | None] = {"unet": unet} | (encoders._asdict() if encoders else {})
    for network, layers in read_lora(key, file, networks).items():
        state = states[network] = {}
        for module, layer in layers.items():
            if _is_unread(network, networks[network], module):
                continue
            if layer.mid is not None or layer.per_input:
                raise UserError(f"{key}: {lora.path}: its kind can only be merged, with model.loras")
            state[f"{module}.lora_A.weight"] = layer.down
            state[f"{module}.lora_B.weight"] = layer.up.float() * layer.scale
            if layer.magnitude is not None:
                shape = (1, -1, 1, 1) if layer.up.ndim == 4 else (-1,)  # as PEFT has them
                state[f"{module}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return states
