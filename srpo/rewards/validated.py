"""A reward that keeps its word, or says in one line which reward did not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from srpo.errors import UserError, one_line
from srpo.rewards.protocol import Pixels, Reward


class CheckedReward:
    """Another reward, whose errors and wrong answers name it. NaN and infinity pass: selection deals with them."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.name, self.reward = name, reward

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n] on the CPU.

        Raises:
            UserError: the reward raised, or returned anything but n numbers.
        """
        with naming(self.name, "score"):
            scores = self.reward.score(images, list(prompts))
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(images),) or scores.is_complex():
            raise UserError(
                f"rewards.{self.name}: score returned {found} for {len(images)} images;"
                f" it must return a float32 tensor [{len(images)}]"
            )
        return scores.detach().float().cpu()

    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim] on the CPU.

        Raises:
            UserError: the reward has no features, or raised.
        """
        if not hasattr(self.reward, "features"):
            raise UserError(
                f"evaluate.features: rewards.{self.name} has no image features; name one that has, such as a clip"
            )
        with naming(self.name, "features"):
            return self.reward.features(images)


@contextmanager
def naming(name: str, what: str) -> Iterator[None]:
    """Whatever the reward `name` raises in here becomes a UserError of one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error
    except torch.OutOfMemoryError:  # may pass: drivers retry what is not a UserError
        raise
    except (Exception, SystemExit) as error:  # a class of the user's own may do anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = one_line(error)
        raise UserError(
            f"rewards.{name}: {what} raised {type(error).__name__}: {text:.200}"
            f" ({Path(last.filename).name}:{last.lineno})"
        ) from error
