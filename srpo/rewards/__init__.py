"""Reward models by family name."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from srpo.errors import UserError
from srpo.params import RewardParams
from srpo.rewards.base import FeatureReward, Pixels, Reward

FAMILIES = {
    "clip": "srpo.rewards.clip:ClipReward",
    "templates": "srpo.rewards.templates:TemplateReward",
}


def load_reward(name: str, spec: RewardParams, root: Path, device: torch.device) -> Reward:
    """The reward model that `rewards.<name>` describes.

    Raises:
        UserError: unknown family, or its model can't be loaded.
    """
    check_family(name, spec)
    module, attribute = FAMILIES[spec.kind].split(":")
    family = getattr(importlib.import_module(module), attribute)
    model = str(root / spec.model) if (root / spec.model).exists() else spec.model
    return family(model, spec.revision, device)


def check_family(name: str, spec: RewardParams) -> None:
    """Raises UserError when `rewards.<name>.kind` names no family."""
    if spec.kind not in FAMILIES:
        raise UserError(f"rewards.{name}.kind: unknown reward {spec.kind!r}; choose one of {', '.join(FAMILIES)}")


__all__ = ["FAMILIES", "FeatureReward", "Pixels", "Reward", "check_family", "load_reward"]
