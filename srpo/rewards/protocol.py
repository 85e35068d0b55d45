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


class AttributeReward(Reward, Protocol):
    """A judge that also says what an image shows of what its prompt leaves open, for `open_diversity`."""

    def attributes(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the value of each of k attributes, int64 [n, k] on the CPU.

        A value is any number from 0 on, with the same meaning for all images of one prompt; k is the same for all
        prompts. It is -1 where the prompt says the attribute, and for all attributes of an image that is not right.
        """
        ...
