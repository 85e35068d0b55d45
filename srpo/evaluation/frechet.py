"""Frechet distance between Gaussians fitted to image features; with Inception's features it is FID.

Moments are packed into one float64 array [1 + dim + dim * dim]: the count, the mean, and the sum of outer products of
what is left when the mean is subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 [dim] and covariance float64 [dim, dim] (divisor n - 1) of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @cached_property
    def factor(self) -> np.ndarray:
        """A matrix float64 [dim, rank] whose product with its transpose is the covariance."""
        try:
            return np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:  # singular, as with fewer images than dimensions
            values, vectors = np.linalg.eigh(self.covariance)
            positive = values > values[-1] * len(values) * np.finfo(float).eps
            return vectors[:, positive] * np.sqrt(values[positive])


def moments(features: np.ndarray) -> np.ndarray:
    """Return the packed moments of features [n, dim] of any float dtype; n may be 0."""
    count, dim = features.shape
    if not count:
        return np.zeros(1 + dim + dim * dim)
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centered = features - mean
    return _pack(count, mean, centered.T @ centered)


def merge_moments(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the packed moments of two sets together.

    By the pairwise rule of Chan, Golub and LeVeque (1983), which, unlike plain sums of squares, keeps its digits when
    the mean is large compared with the standard deviation.
    """
    if not one[0] or not other[0]:
        return one if one[0] else other
    count, mean, scatter = unpack_moments(one)
    other_count, other_mean, other_scatter = unpack_moments(other)
    total = count + other_count
    shift = other_mean - mean
    merged = other_scatter + (scatter + np.outer(shift, shift) * (count * other_count / total))
    return _pack(total, mean + shift * (other_count / total), merged)


def unpack_moments(packed: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return count, mean [dim] and scatter [dim, dim] of packed moments."""
    dim = round((len(packed) - 0.75) ** 0.5 - 0.5)
    return int(packed[0]), packed[1 : 1 + dim], packed[1 + dim :].reshape(dim, dim)


def gaussian(features: np.ndarray) -> Gaussian:
    """Return the Gaussian with the moments of features [n, dim], n at least 2."""
    count, mean, scatter = unpack_moments(moments(features))
    return Gaussian(mean, scatter / (count - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) (Heusel et al., 2017), at least 0; lower is closer.

    With S2 = F F^T, S1 S2 has the nonzero eigenvalues of the symmetric F^T S1 F, so the last trace is the sum of
    their square roots: no matrix square root and no complex numbers. Any factor F will do, and Cholesky's is about
    fifty times cheaper than S2^(1/2). It is cached on `other`: give the set that is compared with many there.

    Estimated from n images it is too high, by an amount that shrinks with n: compare only equal numbers of images.
    """
    product = other.factor.T @ one.covariance @ other.factor
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)
    shift = one.mean - other.mean
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.sqrt(eigenvalues).sum()
    return float(max(0.0, shift @ shift + spread))


def _pack(count: int, mean: np.ndarray, scatter: np.ndarray) -> np.ndarray:
    return np.concatenate([[float(count)], mean, scatter.ravel()])
