"""Loading SDXL: the base pipeline or parts of it, and another VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from srpo.config.schema import ModelParams
from srpo.errors import UserError, one_line
from srpo.runtime.device import load_quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
TEXT_PARTS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")


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
        options = {"revision": model.revision, "variant": model.variant, "dtype": dtype, "use_safetensors": True}
        for name, kind in TEXT_ENCODERS.items():
            if name not in parts:
                parts[name] = load_whole(kind, model.base, subfolder=name, **options)
        pipeline = StableDiffusionXLPipeline.from_pretrained(model.base, **options, **parts)
        _check_whole(pipeline.unet)
        _check_whole(pipeline.vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_vae(model: ModelParams, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE that `model.vae` names: a Hub id, a VAE's folder or that of a whole pipeline.

    Raises:
        UserError: it can't be had or is no VAE.
    """
    inside = "vae" if (Path(model.vae) / "vae" / "config.json").exists() else None
    with _naming("model.vae", model.vae, "a VAE"):
        vae = AutoencoderKL.from_pretrained(
            model.vae, subfolder=inside, revision=model.vae_revision, dtype=dtype, use_safetensors=True
        )
        _check_whole(vae)
        return vae


def load_whole(kind: type[PreTrainedModel], source: str, **options: Any) -> PreTrainedModel:
    """One of transformers' models, which by itself would make up the tensors that its checkpoint lacks.

    Raises:
        ValueError: the checkpoint lacks tensors.
    """
    model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
    return model


def _check_whole(network: torch.nn.Module | None) -> None:
    # diffusers leaves what a checkpoint lacks without data
    missing = [name for name, value in network.named_parameters() if value.is_meta] if network else []
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")


@contextmanager
def _naming(key: str, source: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise whatever a file makes them trip over
        reason = one_line(error)
        raise UserError(f"{key}: can't load {source!r} as {kind}: {reason:.200}") from None
