"""SDXL checkpoints of one file in Stability's layout, as people share them; read without a network.

The folder `sdxl/` beside this module holds diffusers' configuration of SDXL 1.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open

from srpo.lineage.checkpoint_files import (
    EDM_MEAN,
    EDM_SCALING_FACTOR,
    EDM_SIGMA_MAX,
    EDM_SIGMA_MIN,
    EDM_STD,
    read_header,
    scheduler_options,
)
from srpo.models.tokenizer import CONFIG, clip_tokenizer

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def load_single_file(file: Path, dtype: torch.dtype, config: Path = CONFIG, **parts: Any) -> StableDiffusionXLPipeline:
    """Load a pipeline from one `.safetensors` file, with the noise schedule and prediction type that its keys mark.

    Args:
        file: an SDXL checkpoint in Stability's layout.
        config: the configuration's folder in diffusers' layout.
        parts: parts that are loaded already; None leaves a part out.

    Raises:
        Exception: whatever diffusers raises for a file that does not fit.
    """
    tokenizers = {name: clip_tokenizer(pad) for name, pad in PAD_TOKENS.items() if name not in parts}
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(file),
        config=str(config),
        local_files_only=True,
        torch_dtype=dtype,
        scheduler=_scheduler(file, config),
        add_watermarker=False,
        **tokenizers,
        **parts,
    )
    if "vae" not in parts:
        _set_statistics(pipeline.vae, file)
    return pipeline


def _scheduler(file: Path, config: Path) -> SchedulerMixin:
    """Return the scheduler that a file's marker tensors ask for."""
    header = read_header(file)
    if EDM_MEAN in header:
        return EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    if EDM_SIGMA_MAX in header:
        with safe_open(file, "pt") as tensors:
            limits = {
                name: float(tensors.get_tensor(key))
                for name, key in (("sigma_min", EDM_SIGMA_MIN), ("sigma_max", EDM_SIGMA_MAX))
                if key in header
            }
        options = {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}
        return EDMEulerScheduler(**options, **limits)
    return EulerDiscreteScheduler.from_pretrained(config, subfolder="scheduler", **scheduler_options(header))


def _set_statistics(vae: AutoencoderKL, file: Path) -> None:
    """Tell a VAE the mean and standard deviation of its latents, if the file has them."""
    with safe_open(file, "pt") as tensors:
        if EDM_MEAN not in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            return
        mean, std = (tensors.get_tensor(name).flatten().tolist() for name in (EDM_MEAN, EDM_STD))
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=EDM_SCALING_FACTOR)
