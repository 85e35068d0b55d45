"""The device and number format that a stage computes in."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from srpo.errors import UserError
from srpo.runtime import distributed
from srpo.runtime.cpu import is_fast_on_cpu

log = logging.getLogger(__name__)


class DeviceSettings(Protocol):
    """`device` and `dtype` of `runtime` in params.yaml."""

    @property
    def device(self) -> str:
        """`auto`, `cpu` or `cuda`."""

    @property
    def dtype(self) -> str:
        """`auto` or the name of a torch dtype."""


def pick_device(runtime: DeviceSettings) -> torch.device:
    """Return the device of `runtime`, with this process's number if it is CUDA; `auto` is CUDA where available.

    Raises:
        UserError: CUDA is not available, or there are more processes than devices.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda, but torch finds no CUDA device; set auto or cpu")
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"runtime.processes: more than this machine's {torch.cuda.device_count()} CUDA devices; lower it"
        )
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device


def pick_dtype(runtime: DeviceSettings, device: torch.device) -> torch.dtype:
    """Return the compute dtype; `auto` is bfloat16 on CUDA and float32 on a CPU. Warn if the CPU emulates it."""
    if runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu" and not is_fast_on_cpu(runtime.dtype):
        log.warning("runtime.dtype: %s is emulated on this CPU, which is very slow; set float32", runtime.dtype)
    return getattr(torch, runtime.dtype)


def pick_reward_dtype(runtime: DeviceSettings, device: torch.device) -> torch.dtype:
    """Return the dtype of reward models: float16 on CUDA unless `dtype` is float32; float32 on a CPU.

    Never bfloat16: its error is a tenth of the spread between images, ten times float16's, and changes their order.
    """
    return torch.float16 if device.type == "cuda" and runtime.dtype != "float32" else torch.float32
