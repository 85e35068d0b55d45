"""Divergence detection.

A diffusion loss is noisy: it depends on the timesteps drawn, from about 1 near the clean image to 0.01 near pure noise.
So means over many samples are compared: over the last 20 steps, or as many as hold 256 samples; at the start over the
steps so far, once these are 5 steps and 64 samples. A mean has diverged when it is more than `max_loss_ratio` times the
lowest so far, where the lowest counts as 1 at most (the loss of a model that predicts zero), and above the first (so
that a loss that fell far, as dpo's may, is free to rise again).

A loss on pairs can fall while winners become less likely, as long as losers do so faster. So the winners' error, mean
over the same steps, is compared with that of the reference, the model that training started from, for the same noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

WINDOW_STEPS = 20
WINDOW_SAMPLES = 256
FIRST_STEPS = 5
FIRST_SAMPLES = 64
LOSS_OF_ZERO_PREDICTION = 1.0


class DivergenceMonitor:
    """Follows the metrics of one training."""

    def __init__(self, max_loss_ratio: float | None, max_winner_error_ratio: float | None, batch_size: int) -> None:
        """Start without metrics. A limit of None is never exceeded; NaN and infinity are always reported."""
        self._max_ratio = max_loss_ratio or math.inf
        self._max_error_ratio = max_winner_error_ratio or math.inf
        self._min_steps = max(FIRST_STEPS, math.ceil(FIRST_SAMPLES / batch_size))
        window = max(WINDOW_STEPS, math.ceil(WINDOW_SAMPLES / batch_size))
        self._losses: deque[float] = deque(maxlen=window)
        self._winner_errors: deque[float] = deque(maxlen=window)
        self._reference_errors: deque[float] = deque(maxlen=window)
        self._first = math.nan
        self._lowest = math.nan
        self._mean = math.nan

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Add one step's loss, grad_norm and errors; return the key to change and what is wrong, or None."""
        loss = metrics["loss"]
        grad_norm = metrics["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"train.learning_rate: the {'gradient' if math.isfinite(loss) else 'loss'} is not a number"
        self._losses.append(loss)
        if "winner_error" in metrics:
            self._winner_errors.append(metrics["winner_error"])
            self._reference_errors.append(metrics["reference_winner_error"])
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
        if self._winners_exceed(self._max_error_ratio):
            return (
                f"train.learning_rate: the winners' error, {sum(self._winner_errors) / len(self._winner_errors):.4g} in"
                f" the last {len(self._winner_errors)} steps, is more than {self._max_error_ratio:g}"
                " (train.max_winner_error_ratio) times that of the model that training started from,"
            )
        return None

    @property
    def is_rising(self) -> bool:
        """Whether a metric is halfway (on a log scale) to divergence, so that its state is not kept as a good one."""
        is_loss_high = self._mean > self._first and self._mean > math.sqrt(self._max_ratio) * self._lowest
        return is_loss_high or self._winners_exceed(math.sqrt(self._max_error_ratio))

    def _winners_exceed(self, ratio: float) -> bool:
        """Whether the winners' error is more than `ratio` times the reference's; the sums are over the same samples."""
        enough = len(self._winner_errors) >= self._min_steps
        return enough and sum(self._winner_errors) > ratio * sum(self._reference_errors)
