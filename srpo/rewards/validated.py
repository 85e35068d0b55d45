"""Rewards whose errors and wrong return values are reported in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from srpo.errors import UserError, one_line
from srpo.rewards.protocol import Pixels, Reward


class ValidatedReward:
    """A reward whose errors and wrong return values become UserErrors that name it. NaN and infinity pass."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.name = name
        self.reward = reward

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores, float32 [n] on the CPU.

        Raises:
            UserError: the reward raised, or did not return n numbers.
        """
        with reward_errors(self.name, "score"):
            scores = self.reward.score(images, list(prompts))
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(images),) or scores.is_complex():
            raise UserError(
                f"rewards.{self.name}: score returned {_described(scores)} for {len(images)} images;"
                f" it must return a float32 tensor [{len(images)}]"
            )
        return scores.detach().float().cpu()

    def prepare(self, batches: Iterable[Sequence[str]]) -> None:
        """Have a reward that caches prompts depend on these batches of prompts only, if it can.

        Raises:
            UserError: the reward raised.
        """
        if hasattr(self.reward, "prepare"):
            with reward_errors(self.name, "prepare"):
                self.reward.prepare(batches)

    def features(self, images: Pixels) -> torch.Tensor:
        """Return image features, float32 [n, dim] on the CPU.

        Raises:
            UserError: the reward has no image features, or raised.
        """
        if not hasattr(self.reward, "features"):
            raise UserError(
                f"evaluate.features: rewards.{self.name} has no image features; name a reward that has, such as a clip"
            )
        with reward_errors(self.name, "features"):
            return self.reward.features(images)

    def require_attributes(self) -> None:
        """Raise a UserError if the reward has no attributes."""
        if not hasattr(self.reward, "attributes"):
            raise UserError(
                f"evaluate.diversity_judge: rewards.{self.name} has no attributes; name a judge whose class has the"
                " method `attributes`, or remove the key"
            )

    def attributes(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return what images show of what their prompts leave open, int64 [n, k], see `AttributeReward`.

        Raises:
            UserError: the reward has no attributes, raised, or did not return whole numbers for n images.
        """
        self.require_attributes()
        with reward_errors(self.name, "attributes"):
            values = self.reward.attributes(images, list(prompts))  # type: ignore[attr-defined]
        if not isinstance(values, torch.Tensor) or values.dtype != torch.int64 or values.shape[:-1] != (len(images),):
            raise UserError(
                f"rewards.{self.name}: attributes returned {_described(values)} for {len(images)} images;"
                f" it must return an int64 tensor [{len(images)}, k]"
            )
        return values.detach().cpu()


def _described(values: object) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__


@contextmanager
def reward_errors(name: str, action: str) -> Iterator[None]:
    """Turn any exception that the reward `name` raises into a UserError of one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error
    except torch.OutOfMemoryError:  # drivers retry what is not a UserError, and this may pass
        raise
    except (Exception, SystemExit) as error:  # a user's own class may do anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"rewards.{name}: {action} raised {type(error).__name__}: {one_line(error):.200}"
            f" ({Path(last.filename).name}:{last.lineno})"
        ) from error
