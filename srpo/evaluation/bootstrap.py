"""Means and win rates with bootstrap intervals, over scores that are grouped by prompt.

Images of one prompt are not independent, so the bootstrap draws whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

RESAMPLES = 2000
Groups: TypeAlias = "np.ndarray | Sequence[str]"
"""The prompt of each of n values, by id or number."""


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float]:
        """Return `<name>`, `<name>_low` and `<name>_high`, as keys of a flat record."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(values: np.ndarray, groups: Groups) -> Estimate:
    """Return the mean of `values` [n] with the percentile bootstrap's interval over groups (Efron, Tibshirani, 1993).

    The random draws depend only on the number of groups: the same values give the same interval.

    Args:
        values: any float dtype.
        groups: the prompt of each value.
    """
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(place)
    sums = np.bincount(place, weights=values.astype(np.float64))
    draws = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def win_rate(scores: np.ndarray, other: np.ndarray, groups: Groups) -> Estimate:
    """Return the share of pairs in which `scores` [n] beats `other` [n]; a tie counts half. 0.5 is no difference.

    Pairs with a score that is NaN or infinite are left out; without any pair the share is 0.5, between 0 and 1.
    """
    paired = np.isfinite(scores) & np.isfinite(other)
    if not paired.any():
        return Estimate(0.5, 0.0, 1.0)
    wins = (scores > other) + 0.5 * (scores == other)
    return mean_interval(wins[paired], np.asarray(groups)[paired])
