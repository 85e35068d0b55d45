"""Loading SDXL: the base pipeline or parts of it, and another VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from srpo.device import load_quietly
from srpo.errors import UserError
from srpo.sections import ModelParams

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def load_pipeline(model: ModelParams, dtype: torch.dtype, **parts: None) -> StableDiffusionXLPipeline:
    """The base pipeline, from the Hub or a local folder, safetensors only.

    Args:
        parts: `unet=None` and the like leave a part out.

    Raises:
        UserError: it, or `model.vae`, can't be had or is of another kind.
    """
    load_quietly()
    if model.vae and "vae" not in parts:
        parts["vae"] = load_vae(model, dtype)
    with _naming("model.base", model.base, "an SDXL pipeline"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            model.base, revision=model.revision, variant=model.variant, dtype=dtype, use_safetensors=True, **parts
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_vae(model: ModelParams, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE that `model.vae` names: a Hub id, a VAE's folder or that of a whole pipeline.

    Raises:
        UserError: it can't be had or is no VAE.
    """
    inside = "vae" if (Path(model.vae) / "vae" / "config.json").exists() else None
    with _naming("model.vae", model.vae, "a VAE"):
        return AutoencoderKL.from_pretrained(
            model.vae, subfolder=inside, revision=model.vae_revision, dtype=dtype, use_safetensors=True
        )


@contextmanager
def _naming(key: str, source: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: can't load {source!r} as {kind}: {reason:.200}") from None
