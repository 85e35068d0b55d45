"""Kernel distances between two sets of image features: KID and CMMD, unbiased, each with its interval.

Both are squared maximum mean discrepancies (Gretton et al., 2012, eq. 3), taken over all pairs rather than
over random subsets: that estimate has the least variance, needs no random numbers, and costs less from a few thousand
images on. Kernel values are summed block by block and not stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from srpo.evaluation.bootstrap import Estimate, Groups

BLOCK = 1024
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""[n, dim] and [m, dim] to [n, m]."""


def kid(features: np.ndarray, reference: np.ndarray, groups: Groups) -> Estimate:
    """Return KID: MMD^2 with the kernel (x.y / dim + 1)^3 (Binkowski et al., 2018); lower is closer.

    Its expectation does not depend on the number of images and is 0 for two sets of one distribution, so it may be
    negative by chance.

    Args:
        features: [n, dim].
        reference: [m, dim], m at least 3.
        groups: the prompt of each of `features`; without any one group, 2 or more must remain.
    """
    return _distance(features, reference, groups, _cubic)


def cmmd(features: np.ndarray, reference: np.ndarray, groups: Groups) -> Estimate:
    """Return CMMD: 1000 MMD^2 with a Gaussian kernel of sigma 10 on unit CLIP embeddings (Jayasumana et al., 2024).

    This is the paper's unbiased estimator. The code released with it includes the pairs of an image with itself,
    which adds 1000 (1/n + 1/m) (1 - the mean kernel value), little for large sets.

    Args:
        features: [n, dim], of any length; they are normalized.
        reference: [m, dim].
        groups: as in `kid`.
    """
    estimate = _distance(_unit(features), _unit(reference), groups, _gaussian)
    return Estimate(*(CMMD_SCALE * value for value in estimate))


def paired_kid(features: np.ndarray, other: np.ndarray) -> float:
    """Return KID between two sets [n, dim] whose row i shares its prompt and noise; 0 for identical sets.

    Pairs (i, i) between the sets are left out, too: they are not independent, and would make it negative.
    """
    count = len(features)
    within = _sums(features, features, _cubic)[0].sum() + _sums(other, other, _cubic)[0].sum()
    across = _sums(features, other, _cubic)[0].sum()
    return float((within - 2 * across) / (count * (count - 1)))


def _distance(features: np.ndarray, reference: np.ndarray, groups: Groups, kernel: Kernel) -> Estimate:
    """Return unbiased MMD^2 and its interval, by the jackknife over prompts and over reference images."""
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    n = len(features)
    m = len(reference)
    row, own = _sums(features, features, kernel, place)
    other_row, _ = _sums(reference, reference, kernel)
    across, reverse = _cross_sums(features, reference, kernel)
    inner = row.sum() / (n * (n - 1))
    outer = other_row.sum() / (m * (m - 1))
    cross = across.sum() / (n * m)
    # without one prompt
    size = np.bincount(place)
    left = n - size
    inner_left = (row.sum() - 2 * np.bincount(place, row) + np.bincount(place, own)) / (left * (left - 1))
    cross_left = (across.sum() - np.bincount(place, across)) / (left * m)
    prompts = _jackknife(inner_left - 2 * cross_left, len(size))
    # without one reference image
    outer_left = (other_row.sum() - 2 * other_row) / ((m - 1) * (m - 2))
    references = _jackknife(outer_left - 2 * (reverse.sum() - reverse) / (n * (m - 1)), m)
    value = inner + outer - 2 * cross
    error = np.sqrt(prompts + references)
    return Estimate(float(value), float(value - 1.96 * error), float(value + 1.96 * error))


def _jackknife(values: np.ndarray, count: int) -> float:
    return (count - 1) / count * float(((values - values.mean()) ** 2).sum())


def _sums(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row i the kernel's sum over all j other than i, and over those j of the same group."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    row, own = np.empty(len(x)), np.zeros(len(x))
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        values = kernel(x[part], y)
        local = np.arange(len(values))
        values[local, start + local] = 0
        row[part] = values.sum(axis=1)
        if groups is not None:
            own[part] = (values * (groups[part, None] == groups)).sum(axis=1)
    return row, own


def _cross_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    row, column = np.empty(len(x)), np.zeros(len(y))
    for start in range(0, len(x), BLOCK):
        values = kernel(x[start : start + BLOCK], y)
        row[start : start + BLOCK] = values.sum(axis=1)
        column += values.sum(axis=0)
    return row, column


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * (x @ y.T)
    return np.exp(squared / (-2 * CMMD_SIGMA**2))


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
