"""Optimizers by name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch

from srpo.config.schema import TrainParams
from srpo.errors import UserError
from srpo.runtime.extras import require


def make_optimizer(
    settings: TrainParams, parameters: Sequence[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer that `train.optimizer` names.

    Raises:
        UserError: its package is not installed, or it needs CUDA.
    """
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    name = settings.optimizer
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, **options)
    if name == "prodigy":
        require("prodigyopt", "train.optimizer: prodigy")
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            return Prodigy(parameters, safeguard_warmup=settings.warmup_steps > 0, **options)
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise UserError("train.optimizer: paged_adamw_8bit needs CUDA; take adamw_8bit or adamw")
    require("bitsandbytes", f"train.optimizer: {name}")
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, **options)
