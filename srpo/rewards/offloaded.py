"""Rewards that are on the device only while they compute (`runtime.offload`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from srpo.rewards.protocol import Pixels, Reward
from srpo.rewards.validated import ValidatedReward
from srpo.runtime.turns import TURNS


class OffloadedReward(ValidatedReward):
    """A reward whose networks take turns with all others.

    Of a class of one's own, networks that are attributes of the reward do; others stay where the class has put them.
    """

    def __init__(self, name: str, reward: Reward, device: torch.device) -> None:
        super().__init__(name, reward)
        self._device = device
        self._networks = list(networks_of(reward))
        for network in self._networks:
            network.to("cpu")

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, as `ValidatedReward.score` does."""
        TURNS.bring(self._networks, self._device)
        return super().score(images, prompts)

    def prepare(self, batches: Iterable[Sequence[str]]) -> None:
        """Prepare for these batches, as `ValidatedReward.prepare` does."""
        TURNS.bring(self._networks, self._device)
        super().prepare(batches)

    def features(self, images: Pixels) -> torch.Tensor:
        """Return image features, as `ValidatedReward.features` does."""
        TURNS.bring(self._networks, self._device)
        return super().features(images)


def networks_of(thing: Any) -> Iterator[torch.nn.Module]:
    """Yield the networks among an object's attributes, and in parts of this package among theirs."""
    for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
        if isinstance(value, torch.nn.Module):
            yield value
        elif type(value).__module__.startswith("srpo."):
            yield from networks_of(value)
