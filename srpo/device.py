"""Which device and number format a stage computes in, and how models load: without a bar for every file."""

from __future__ import annotations

import sys

import torch

from srpo.errors import UserError
from srpo.sections import RuntimeParams


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
    """The device asked for; `auto` takes CUDA when there is one.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


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
