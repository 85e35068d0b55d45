"""Adapters, the trained weights of a round: a LoRA, or the whole UNet.

An adapter folder is in diffusers' layout: `pytorch_lora_weights.safetensors`, relative to the base model, or
`diffusion_pytorch_model.safetensors` with its config.json, in float32 so that small steps survive many rounds.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from srpo.errors import UserError, one_line
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, check_weights
from srpo.models.merging import merge_lora, surviving_share
from srpo.rounds import BASE, Round

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

    def __init__(self, unet: UNet2DConditionModel, rank: int, modules: list[str], seed: int) -> None:
        unet.requires_grad_(False)
        self.unet = unet
        self._reference: str | None = None
        # alpha = rank keeps the scale at 1, so that readers of the file need no alpha
        self._config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules)
        torch.manual_seed(seed)  # PEFT draws LoRA's A matrices from the global generator
        self._add("default")

    def load(self, file: Path, *, with_reference: bool) -> None:
        """Start from the LoRA of a file.

        Args:
            with_reference: keep a frozen copy of it for `reference`.

        Raises:
            ValueError: it has another rank or other modules.
            UserError: it can't be read.
        """
        with _adapter_errors(file):
            state = _peft_state(file)
        self._set(state, "default")
        if with_reference:
            self._reference = "reference"
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
        """Write the LoRA in diffusers' layout."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        layers = {name: value.float().cpu().contiguous() for name, value in layers.items()}
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)

    def _add(self, name: str) -> None:
        with warnings.catch_warnings():  # PEFT warns of a second adapter, which is intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self.unet.add_adapter(self._config, name)
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _set(self, state: dict[str, torch.Tensor], name: str) -> None:
        try:
            result = set_peft_model_state_dict(self.unet, state, adapter_name=name)
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
    model = LoraUNet(unet, settings.rank, list(settings.target_modules), round.params.seed)
    if file and folder:
        check_weights(folder)
        try:
            model.load(file, with_reference=with_reference)
        except ValueError:
            raise UserError(
                f"rounds.{round.key}.train: rank or target_modules differ from those of parent {parent}; keep them"
            ) from None
    return model
