"""When a training has gone astray.

A diffusion loss is noisy: it depends on the timesteps drawn, from about 1 near the picture to 0.01 near pure noise. So
means over many samples are compared: over the last 20 steps, or as many as hold 256 samples; at the start over what
there is, once that is 5 steps and 64 samples. Such a mean is a spike when it is more than `max_loss_ratio` times the
lowest so far, where the lowest counts as 1 at most (what a model loses that predicts nothing), and above the first
(so that a loss that fell far, as dpo's may, is free to rise again).
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_STEPS, WINDOW_SAMPLES = 20, 256
FIRST_STEPS, FIRST_SAMPLES = 5, 64
NOTHING_PREDICTED = 1.0


class LossWatch:
    """Follows the losses of one training."""

    def __init__(self, max_ratio: float | None, batch_size: int) -> None:
        """`max_ratio` None: only what is no number is a problem."""
        self._max_ratio = max_ratio or math.inf
        self._enough = max(FIRST_STEPS, math.ceil(FIRST_SAMPLES / batch_size))
        self._losses: deque[float] = deque(maxlen=max(WINDOW_STEPS, math.ceil(WINDOW_SAMPLES / batch_size)))
        self._first = self._lowest = self._mean = math.nan

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong after one more step, and the key to change; None when nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"train.learning_rate: the {'gradient' if math.isfinite(loss) else 'loss'} is not a number"
        self._losses.append(loss)
        if len(self._losses) < self._enough:
            return None
        self._mean = sum(self._losses) / len(self._losses)
        if math.isnan(self._first):
            self._first = self._lowest = min(self._mean, NOTHING_PREDICTED)
        self._lowest = min(self._lowest, self._mean)
        if self._mean > self._first and self._mean > self._max_ratio * self._lowest:
            return (
                f"train.learning_rate: the mean loss of the last {len(self._losses)} steps, {self._mean:.4g},"
                f" is more than {self._max_ratio:g} (train.max_loss_ratio) times the lowest so far, {self._lowest:.4g},"
            )
        return None

    @property
    def rising(self) -> bool:
        """Half of the way (on a log scale) to a problem: no state to keep as a good one."""
        return self._mean > self._first and self._mean > math.sqrt(self._max_ratio) * self._lowest
