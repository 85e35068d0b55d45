"""Estimates with intervals, from scores and features of pictures that are grouped by prompt.

Pictures of one prompt are not independent, so the bootstrap draws whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float]:
        """As keys of a flat record: `<name>`, `<name>_low`, `<name>_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(values: np.ndarray, groups: Sequence[str]) -> Estimate:
    """Mean of `values` [n], with the percentile bootstrap's interval over groups (Efron and Tibshirani, 1993).

    The resampling is seeded by nothing but the number of groups: the same values give the same interval.

    Args:
        values: any float dtype.
        groups: the prompt id of each value.
    """
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(place)
    sums = np.bincount(place, weights=values.astype(np.float64))
    draws = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def win_rate(scores: np.ndarray, other: np.ndarray, groups: Sequence[str]) -> Estimate:
    """Share of pairs in which `scores` [n] beats `other` [n]; a tie counts half. 0.5 is no difference."""
    return mean_interval((scores > other) + 0.5 * (scores == other), groups)


def diversity(features: np.ndarray, groups: Sequence[str]) -> Estimate:
    """Mean cosine distance (0 to 2) between the pictures of one prompt, averaged over prompts.

    Args:
        features: [n, dim].
        groups: the prompt id of each row. Prompts with a single picture do not count; 0 if all are such.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    names, distances = np.asarray(groups), {}
    for name in dict.fromkeys(groups):
        rows = unit[names == name]
        if len(rows) > 1:
            similarity = (rows @ rows.T).sum() - len(rows)
            distances[name] = 1 - similarity / (len(rows) * (len(rows) - 1))
    if not distances:
        return Estimate(0.0, 0.0, 0.0)
    return mean_interval(np.array(list(distances.values())), list(distances))
