"""Divergence detection.

A diffusion loss is noisy: it depends on the timesteps drawn, from about 1 near the clean image to 0.01 near pure noise.
So means over many samples are compared: over the last 20 steps, or as many as hold 256 samples; at the start over the
steps so far, once these are 5 steps and 64 samples. A mean has diverged when it is more than `max_loss_ratio` times the
lowest so far, where the lowest counts as 1 at most (the loss of a model that predicts zero), and above the first (so
that a loss that fell far, as dpo's may, is free to rise again).
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_STEPS = 20
WINDOW_SAMPLES = 256
FIRST_STEPS = 5
FIRST_SAMPLES = 64
LOSS_OF_ZERO_PREDICTION = 1.0


class DivergenceMonitor:
    """Follows the losses of one training."""

    def __init__(self, max_ratio: float | None, batch_size: int) -> None:
        """Start without losses. If `max_ratio` is None, only NaN and infinity are reported."""
        self._max_ratio = max_ratio or math.inf
        self._min_steps = max(FIRST_STEPS, math.ceil(FIRST_SAMPLES / batch_size))
        self._losses: deque[float] = deque(maxlen=max(WINDOW_STEPS, math.ceil(WINDOW_SAMPLES / batch_size)))
        self._first = math.nan
        self._lowest = math.nan
        self._mean = math.nan

    def check(self, loss: float, grad_norm: float) -> str | None:
        """Add one step; return the key to change and what is wrong, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"train.learning_rate: the {'gradient' if math.isfinite(loss) else 'loss'} is not a number"
        self._losses.append(loss)
        if len(self._losses) < self._min_steps:
            return None
        self._mean = sum(self._losses) / len(self._losses)
        if math.isnan(self._first):
            self._first = self._lowest = min(self._mean, LOSS_OF_ZERO_PREDICTION)
        self._lowest = min(self._lowest, self._mean)
        if self._mean > self._first and self._mean > self._max_ratio * self._lowest:
            return (
                f"train.learning_rate: the mean loss of the last {len(self._losses)} steps, {self._mean:.4g},"
                f" is more than {self._max_ratio:g} (train.max_loss_ratio) times the lowest so far, {self._lowest:.4g},"
            )
        return None

    @property
    def is_rising(self) -> bool:
        """Whether the loss is halfway (on a log scale) to divergence, so that its state is not kept as a good one."""
        return self._mean > self._first and self._mean > math.sqrt(self._max_ratio) * self._lowest
