"""Reward models by family name. Light to import: a family's own imports come with its first use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.rewards.base import FeatureReward, Pixels, Reward

if TYPE_CHECKING:
    import torch

    from srpo.params import RewardParams

FAMILIES = {
    "clip": "srpo.rewards.clip:ClipReward",
    "templates": "srpo.rewards.templates:TemplateReward",
}


def load_reward(spec: RewardParams, root: Path, device: torch.device) -> Reward:
    """The reward model that a section of `rewards` describes.

    Raises:
        UserError: its model can't be loaded.
    """
    module, attribute = FAMILIES[spec.kind].split(":")
    family = getattr(importlib.import_module(module), attribute)
    model = str(root / spec.model) if (root / spec.model).exists() else spec.model
    return family(model, spec.revision, device)


__all__ = ["FAMILIES", "FeatureReward", "Pixels", "Reward", "load_reward"]
