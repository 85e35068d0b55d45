"""Adapters, the trained weights of a round: a LoRA, or the whole UNet.

An adapter folder is in diffusers' layout: `pytorch_lora_weights.safetensors`, relative to the base model, or
`diffusion_pytorch_model.safetensors` with its config.json, in float32 so that small steps survive many rounds.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from srpo.config.schema import InitialLora, TrainParams
from srpo.errors import UserError, one_line
from srpo.lineage.checkpoint_files import lora_file
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, check_weights
from srpo.models.lora_dropout import LoraDropout
from srpo.models.lora_files import read_lora
from srpo.models.merging import merge_lora, surviving_share
from srpo.rounds import BASE, Round
from srpo.storage.hashing import file_digest

log = logging.getLogger(__name__)

MIN_SURVIVING_SHARE = 0.95  # in bfloat16 that of a change by about .5 % of the weights
MAX_SHARD_SIZE = "1TB"  # lineage.json has the digest of one file, so weights are never split


def with_adapter(
    unet: UNet2DConditionModel, folder: Path, *, stored_as: torch.dtype | None = None
) -> UNet2DConditionModel:
    """Return the UNet with an adapter applied, for sampling; a folder without weights (base's) changes nothing.

    A LoRA is merged. In 16 bits most of a small change would be lost by rounding; if less than MIN_SURVIVING_SHARE of
    it would survive, the LoRA stays beside the weights, as layers of PEFT.

    Args:
        stored_as: the dtype that merged weights are cast to later; merge always, and log how much will survive.

    Raises:
        UserError: the weights are not those that the folder's lineage.json names, can't be read, or belong to another
            kind of UNet.
    """
    check_weights(folder)
    if (folder / UNET_FILE).exists():
        with _adapter_errors(folder / UNET_FILE):
            return UNet2DConditionModel.from_pretrained(folder, torch_dtype=unet.dtype, use_safetensors=True)
    if (folder / WEIGHTS_FILE).exists():
        with _adapter_errors(folder / WEIGHTS_FILE):
            unet.load_lora_adapter(folder, weight_name=WEIGHTS_FILE, prefix="unet")
            if not getattr(unet, "peft_config", None):  # diffusers only warns
                raise ValueError("it holds no LoRA of a UNet")
            _reload_exactly(unet, folder / WEIGHTS_FILE)
        _merge(unet, folder, stored_as)
    return unet


def _reload_exactly(unet: UNet2DConditionModel, file: Path) -> None:
    """Load the attached LoRA's weights anew in float32; diffusers casts them to the UNet's dtype."""
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    (adapter,) = unet.peft_config
    set_peft_model_state_dict(unet, _peft_state(file), adapter_name=adapter)


def _merge(unet: UNet2DConditionModel, folder: Path, stored_as: torch.dtype | None) -> None:
    dtype = stored_as or unet.dtype
    if dtype == torch.float32:
        merge_lora(unet)
        return
    share = surviving_share(unet, dtype)
    name = str(dtype).removeprefix("torch.")
    if share >= MIN_SURVIVING_SHARE or stored_as:
        merge_lora(unet)
        level, hint = logging.INFO, ""
        if share < MIN_SURVIVING_SHARE:
            level, hint = logging.WARNING, "; --dtype float32 keeps all of it"
        log.log(level, "%s: merged into %s weights; %.1f %% of its change survives%s", folder, name, 100 * share, hint)
        return
    for parameter_name, parameter in unet.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(unet.dtype)
    log.info(
        "%s: kept beside the weights; merged into %s only %.1f %% of its change would survive",
        *(folder, name, 100 * share),
    )


def _peft_state(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA file by PEFT's names."""
    state = {name.removeprefix("unet."): value for name, value in load_file(file).items()}
    return convert_unet_state_dict_to_peft(state)


@contextlib.contextmanager
def _adapter_errors(file: Path) -> Iterator[None]:
    """Turn any exception in reading this file into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise many kinds for a broken file
        reason = one_line(error)
        raise UserError(
            f"{file}: not an adapter of this base model ({reason:.120}); `dvc checkout` restores it"
        ) from None


class TrainableUNet:
    """A UNet in training. Its trained parameters are those that require gradients, all float32."""

    unet: UNet2DConditionModel
    dropout: LoraDropout | None = None

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: value for name, value in self.unet.named_parameters() if value.requires_grad}

    def reference(self) -> contextlib.AbstractContextManager[UNet2DConditionModel]:
        """Give the model that training started from inside a `with` block, for predictions without gradients."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the adapter's weights, without lineage.json, into a folder."""
        raise NotImplementedError


class LoraUNet(TrainableUNet):
    """A UNet whose own weights are frozen, with a LoRA in training."""

    def __init__(self, unet: UNet2DConditionModel, settings: TrainParams, seed: int) -> None:
        """Add a LoRA that changes nothing yet.

        Raises:
            UserError: `train.target_modules` names a module that the UNet lacks or that can't have LoRA.
        """
        unet.requires_grad_(False)
        self.unet = unet
        self.dropout: LoraDropout | None = None
        self._reference: str | None = None
        alpha = settings.alpha or settings.rank
        self._scale = alpha / (math.sqrt(settings.rank) if settings.use_rslora else settings.rank)
        self._config = LoraConfig(
            r=settings.rank,
            lora_alpha=alpha,
            target_modules=list(settings.target_modules),
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            lora_dropout=settings.lora_dropout,
        )
        torch.manual_seed(seed)  # PEFT draws LoRA's A matrices from the global generator
        self._add("default")
        if settings.lora_dropout:
            self.dropout = LoraDropout(unet, "default")

    def load(self, state: Mapping[str, torch.Tensor], *, with_reference: bool) -> None:
        """Start from a LoRA.

        Args:
            state: its tensors by PEFT's names, at a scale of 1.
            with_reference: keep a frozen copy of it for `reference`.

        Raises:
            ValueError: it has another rank or other modules.
        """
        state = {name: value / self._scale if ".lora_B." in name else value for name, value in state.items()}
        self._set(state, "default")
        if with_reference:
            self._reference = "reference"
            self._config = copy.copy(self._config)
            self._config.lora_dropout = 0.0
            self._add("reference")
            self._set(state, "reference")
            self.unet.set_adapter("default")

    @contextlib.contextmanager
    def reference(self) -> Iterator[UNet2DConditionModel]:
        """Give the UNet with the LoRA that training started from, or without one."""
        if self._reference:
            self.unet.set_adapter(self._reference)
        else:
            self.unet.disable_adapters()
        try:
            yield self.unet
        finally:
            if self._reference:
                self.unet.set_adapter("default")
            else:
                self.unet.enable_adapters()

    def save(self, folder: Path) -> None:
        """Write the LoRA in diffusers' layout, at a scale of 1, so that readers of the file need no alpha."""
        state = get_peft_model_state_dict(self.unet)
        state = {name: value.float() * (self._scale if ".lora_B." in name else 1) for name, value in state.items()}
        converted = convert_state_dict_to_diffusers(state)
        if not any(".lora_A." in name for name in converted):  # diffusers reads PEFT's names, too, but no mixture
            state = converted
        layers = {name: value.cpu().contiguous() for name, value in state.items()}
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)

    def _add(self, name: str) -> None:
        with warnings.catch_warnings():  # PEFT warns of a second adapter, which is intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            try:
                self.unet.add_adapter(self._config, name)
            except ValueError as error:
                raise UserError(f"train.target_modules: {one_line(error):.200}") from None
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _set(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        try:
            result = set_peft_model_state_dict(self.unet, dict(state), adapter_name=name)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        if result.unexpected_keys or len(get_peft_model_state_dict(self.unet, adapter_name=name)) != len(state):
            raise ValueError("other modules")


class FullUNet(TrainableUNet):
    """A float32 UNet with every weight in training."""

    def __init__(self, unet: UNet2DConditionModel, *, with_reference: bool, dtype: torch.dtype) -> None:
        """Keep a frozen copy in `dtype` for `reference`, if `with_reference`."""
        self.unet = unet.requires_grad_(True)
        self._reference = copy.deepcopy(unet).requires_grad_(False) if with_reference else None
        if self._reference is not None and dtype != unet.dtype:
            self._reference.to(dtype)

    @contextlib.contextmanager
    def reference(self) -> Iterator[UNet2DConditionModel]:
        """Give the frozen copy."""
        yield self._reference

    def save(self, folder: Path) -> None:
        """Write the UNet in diffusers' layout."""
        self.unet.save_pretrained(folder, safe_serialization=True, max_shard_size=MAX_SHARD_SIZE)


def make_trainable_unet(
    unet: UNet2DConditionModel, round: Round, *, with_reference: bool, dtype: torch.dtype
) -> TrainableUNet:
    """Return the model of the round at the start of its training: with the parent's weights, or base's.

    Args:
        unet: base's; float32 for `method: full`.
        with_reference: keep what `reference` needs.
        dtype: compute dtype.

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
        return FullUNet(start, with_reference=with_reference, dtype=dtype)
    state = None
    what = f"those of parent {parent}; keep them"
    if file and folder:
        check_weights(folder)
        with _adapter_errors(file):
            state = _peft_state(file)
    elif settings.initial_lora:
        state = _initial_state(unet, settings.initial_lora)
        what = "those of train.initial_lora; set them to its own, or merge it with model.loras"
    model = LoraUNet(unet, settings, round.params.seed)
    if state:
        try:
            model.load(state, with_reference=with_reference)
        except ValueError:
            raise UserError(f"rounds.{round.key}.train: rank, target_modules or use_dora differ from {what}") from None
    return model


def _initial_state(unet: UNet2DConditionModel, lora: InitialLora) -> dict[str, torch.Tensor]:
    """Return a LoRA file's tensors by PEFT's names, at a scale of 1.

    Raises:
        UserError: it is missing, of another kind, or another one than the sha256 says.
    """
    key = "train.initial_lora"
    file = lora_file(key, Path(), lora.path)
    if (found := file_digest(file)) != lora.sha256:
        raise UserError(f"{key}.sha256: that of {lora.path} is {found}; set it, if this is the file you mean")
    state: dict[str, torch.Tensor] = {}
    networks: dict[str, torch.nn.Module | None] = {"unet": unet}
    for module, layer in read_lora(key, file, networks).get("unet", {}).items():
        if layer.mid is not None or layer.per_input:
            raise UserError(f"{key}: {lora.path}: its kind can only be merged, with model.loras")
        state |= {f"{module}.lora_A.weight": layer.down, f"{module}.lora_B.weight": layer.up.float() * layer.scale}
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.up.ndim == 4 else (-1,)  # as PEFT has them
            state[f"{module}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return state
