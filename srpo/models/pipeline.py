"""Loading SDXL: the base pipeline or parts of it, and a VAE of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from srpo.config.schema import ModelParams
from srpo.errors import user_error
from srpo.models.hub import hide_loading_bars, load_complete

TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
TEXT_PARTS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")


def load_pipeline(model: ModelParams, dtype: torch.dtype, **parts: None) -> StableDiffusionXLPipeline:
    """Load the base pipeline from the Hub or a local folder, safetensors only.

    Args:
        parts: `unet=None` and the like leave a part out.

    Raises:
        UserError: it, or `model.vae`, can't be loaded or is of another kind.
    """
    hide_loading_bars()
    loaded: dict[str, Any] = dict(parts)
    if model.vae and "vae" not in parts:
        loaded["vae"] = load_vae(model, dtype)
    with user_error(f"model.base: can't load {model.base!r} as an SDXL pipeline"):
        options: dict[str, Any] = {
            "revision": model.revision, "variant": model.variant, "dtype": dtype, "use_safetensors": True,
        }  # fmt: skip
        for name, kind in TEXT_ENCODERS.items():
            if name not in loaded:
                loaded[name] = load_complete(kind, model.base, subfolder=name, **options)
        pipeline = StableDiffusionXLPipeline.from_pretrained(model.base, **options, **loaded)
        _check_complete(pipeline.unet)
        _check_complete(pipeline.vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def optimize_for_inference(pipeline: StableDiffusionXLPipeline, compiled: bool = False) -> None:
    """Change a pipeline's weight layout for fast sampling on CUDA; results change by rounding only.

    Call it after an adapter is merged: LoRA finds the projections by their names before they are fused.

    Args:
        compiled: compile the UNet's repeated blocks, once for all blocks of a kind.
    """
    pipeline.fuse_qkv_projections()
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)


def _check_complete(network: torch.nn.Module | None) -> None:
    # diffusers leaves tensors that a checkpoint lacks on the meta device
    missing = [name for name, value in network.named_parameters() if value.is_meta] if network else []
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
