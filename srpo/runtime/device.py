"""Device and number format of a stage's computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from srpo.errors import UserError
from srpo.runtime import distributed

if TYPE_CHECKING:
    from srpo.config.schema import RuntimeParams


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
