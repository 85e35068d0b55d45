"""Which device and number format a stage computes in, and how models load: without a bar for every file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from srpo.config.schema import RuntimeParams
from srpo.errors import UserError
from srpo.runtime import distributed

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def load_quietly() -> None:
    """Turn off the bars that diffusers and transformers, if imported, draw over weights; downloads keep theirs.

    The Hub's warnings of every retry go too: what ends in an error is told in one line by whoever loads.
    """
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    hub_logging.set_verbosity_error()  # here and not in cli.run: its import would undo that

    downloads = not are_progress_bars_disabled()
    for library in ("diffusers", "transformers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.disable_progress_bar()
    if downloads:  # transformers turns those off with its own
        enable_progress_bars()


def pick_device(runtime: RuntimeParams) -> torch.device:
    """The device asked for; `auto` takes CUDA when there is one, of several this process's own.

    Raises:
        UserError: CUDA was asked for and there is none, or there are more processes than devices.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"runtime.processes: more than the {torch.cuda.device_count()} CUDA devices here; ask for fewer"
        )
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device


def pick_dtype(runtime: RuntimeParams, device: torch.device) -> torch.dtype:
    """The compute dtype; `auto` is bfloat16 on CUDA and float32 on a CPU."""
    if runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, runtime.dtype)


def pick_reward_dtype(runtime: RuntimeParams, device: torch.device) -> torch.dtype:
    """What reward models compute in: float16 on CUDA unless float32 is asked for, float32 on a CPU.

    Never bfloat16: its error is a tenth of the spread between pictures, ten times float16's, and reorders them.
    """
    return torch.float16 if device.type == "cuda" and runtime.dtype != "float32" else torch.float32


def speed_up(pipeline: StableDiffusionXLPipeline, compiled: bool = False) -> None:
    """Lay a pipeline's weights out for sampling on CUDA; its results change by rounding only.

    To be called after an adapter is merged: LoRA knows the projections by the names they have before they are fused.

    Args:
        compiled: compile the UNet's repeated blocks, once for all blocks of a kind.
    """
    pipeline.fuse_qkv_projections()
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
