"""The interface of reward models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Pixels: TypeAlias = "torch.Tensor"
"""uint8 [n, 3, height, width], RGB."""


class Reward(Protocol):
    """A model that scores images against prompts."""

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the score of image i for prompt i, float32 [n] on the CPU, higher is better, in the family's units."""
        ...


class FeatureReward(Reward, Protocol):
    """A reward whose image features also serve FID, KID and diversity."""

    def features(self, images: Pixels) -> torch.Tensor:
        """Return image features, float32 [n, dim] on the CPU."""
        ...
