"""Loading SDXL: the base pipeline or parts of it, and a VAE of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from srpo.config.schema import ModelParams
from srpo.errors import UserError, user_error
from srpo.lineage.checkpoint_files import check_checkpoint, weights_variant
from srpo.models.base_loras import merge_base_loras
from srpo.models.fp8 import FP8, round_to_fp8, store_in_fp8
from srpo.models.hub import hide_loading_bars, load_complete
from srpo.models.single_file import load_single_file

TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
NETWORKS = TEXT_ENCODERS | {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
TEXT_PARTS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")


def load_pipeline(model: ModelParams, dtype: torch.dtype, **parts: None) -> StableDiffusionXLPipeline:
    """Load the base pipeline from the Hub, a local folder or one file, safetensors only.

    Args:
        parts: `unet=None` and the like leave a part out.

    Raises:
        UserError: it, `model.vae`, `model.scheduler` or one of `model.loras` can't be loaded or is of another kind.
    """
    hide_loading_bars()
    loaded: dict[str, Any] = dict(parts)
    fp8 = model.fp8 and "unet" not in parts
    loaded_as = torch.float32 if model.loras or fp8 else dtype  # so that changed weights are rounded once
    if model.vae and "vae" not in parts:
        loaded["vae"] = load_vae(model, loaded_as)
    with user_error(f"model.base: can't load {model.base!r} as an SDXL pipeline"):
        path = _local(model, loaded)
        check_checkpoint("model.base", path, model.variant, "vae" not in loaded, model.scheduler)
        if path.is_file():
            pipeline = load_single_file(path, loaded_as, **loaded)
        else:
            pipeline = _load_folder(path, loaded_as, model.variant, **loaded)
        for name in NETWORKS:
            _check_complete(getattr(pipeline, name))
    if model.loras:
        merge_base_loras(pipeline, model, FP8 if fp8 else dtype)
    if fp8:
        round_to_fp8(pipeline.unet)
    if loaded_as != dtype:
        pipeline.to(dtype)
    pipeline.scheduler = _scheduler(model, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _local(model: ModelParams, loaded: Mapping[str, Any]) -> Path:
    """Return the local folder or file of the base, which is downloaded if it is on the Hub and not in its cache."""
    if Path(model.base).exists():
        return Path(model.base)
    options = {"revision": model.revision, "variant": model.variant, "use_safetensors": True}
    return Path(StableDiffusionXLPipeline.download(model.base, **options, **loaded))


def _load_folder(folder: Path, dtype: torch.dtype, variant: str | None, **loaded: Any) -> StableDiffusionXLPipeline:
    for name, kind in NETWORKS.items():
        if name not in loaded:
            options: dict[str, Any] = {"variant": weights_variant(folder, name, variant), "dtype": dtype}
            load = partial(load_complete, kind) if name in TEXT_ENCODERS else kind.from_pretrained
            loaded[name] = load(str(folder), subfolder=name, use_safetensors=True, **options)
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, **loaded)


def _scheduler(model: ModelParams, own: SchedulerMixin) -> SchedulerMixin:
    """Return the base's own scheduler, changed as `model.scheduler` and `model.scheduler_config` say."""
    if not model.scheduler and not model.scheduler_config:
        return own
    name = model.scheduler or type(own).__name__
    kind = getattr(diffusers, name)
    if unknown := sorted(model.scheduler_config.keys() - inspect.signature(kind).parameters.keys()):
        raise UserError(f"model.scheduler_config: {name} has no option {unknown[0]!r}")
    with user_error(f"model.scheduler: can't make {name} from the base's configuration and model.scheduler_config"):
        return kind.from_config(own.config, **model.scheduler_config)


def load_vae(model: ModelParams, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE that `model.vae` names: a Hub id, the folder of a VAE or of a whole pipeline.

    Raises:
        UserError: it can't be loaded or is not a VAE.
    """
    assert model.vae
    subfolder = "vae" if (Path(model.vae) / "vae" / "config.json").exists() else None
    with user_error(f"model.vae: can't load {model.vae!r} as a VAE"):
        vae = AutoencoderKL.from_pretrained(
            model.vae, subfolder=subfolder, revision=model.vae_revision, dtype=dtype, use_safetensors=True
        )
        _check_complete(vae)
        return vae


def optimize_for_inference(pipeline: StableDiffusionXLPipeline, *, compiled: bool = False, fp8: bool = False) -> None:
    """Change a pipeline's weight layout for fast sampling on CUDA; results change by rounding only.

    Call it after an adapter is merged: LoRA finds the projections by their names before they are fused.

    Args:
        compiled: compile the UNet's repeated blocks, once for all blocks of a kind; not possible with `fp8`.
        fp8: keep the UNet's rounded weights in eight bits.
    """
    if not getattr(pipeline.unet, "peft_config", None):  # fused projections would leave out a LoRA beside the weights
        pipeline.fuse_qkv_projections()
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    if fp8:
        store_in_fp8(pipeline.unet)
    elif compiled:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)


def _check_complete(network: torch.nn.Module | None) -> None:
    # diffusers leaves tensors that a checkpoint lacks on the meta device
    missing = [name for name, value in network.named_parameters() if value.is_meta] if network else []
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
