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
        returned = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(images),) or scores.is_complex():
            raise UserError(
                f"rewards.{self.name}: score returned {returned} for {len(images)} images;"
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
