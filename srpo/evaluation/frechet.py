"""Frechet distance between Gaussians fitted to image features; with Inception's features it is FID."""

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
        """float64 [dim, rank] that times its own transpose is the covariance; kept, for comparing with many."""
        try:
            return np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:  # singular, as with fewer pictures than dimensions
            values, vectors = np.linalg.eigh(self.covariance)
            real = values > values[-1] * len(values) * np.finfo(float).eps
            return vectors[:, real] * np.sqrt(values[real])


class Moments:
    """Mean and covariance of features that come batch by batch; memory [dim, dim] whatever their number.

    Batches are merged in float64 by the pairwise rule of Chan, Golub and LeVeque (1983), which, unlike plain
    sums of squares, keeps its digits when the features' mean is large beside their spread.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: np.ndarray) -> None:
        """Take in features [n, dim] of any float dtype; n may be 0."""
        if not len(features):
            return
        features = features.astype(np.float64)
        count, mean = len(features), features.mean(axis=0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.count:
            total = self.count + count
            shift = mean - self._mean
            scatter += self._scatter + np.outer(shift, shift) * (self.count * count / total)
            mean = self._mean + shift * (count / total)
            count = total
        self.count, self._mean, self._scatter = count, mean, scatter

    def gaussian(self) -> Gaussian:
        """The Gaussian with the moments of all features seen, at least two."""
        return Gaussian(self._mean, self._scatter / (self.count - 1))


def gaussian(features: np.ndarray) -> Gaussian:
    """The Gaussian with the moments of features [n, dim], n at least 2."""
    moments = Moments()
    moments.add(features)
    return moments.gaussian()


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) (Heusel et al., 2017), at least 0; lower is closer.

    With S2 = F F^T, S1 S2 has the nonzero eigenvalues of the symmetric F^T S1 F, so the last trace is the sum of
    their square roots: no matrix square root and no complex numbers. Any factor F will do, and Cholesky's is
    some fifty times cheaper than S2^(1/2). It is taken of `other`; give the set that is compared with many there.

    Estimated from n images it is too high, by an amount that shrinks with n: compare only equal numbers.
    """
    product = other.factor.T @ one.covariance @ other.factor
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)
    shift = one.mean - other.mean
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.sqrt(eigenvalues).sum()
    return float(max(0.0, shift @ shift + spread))
