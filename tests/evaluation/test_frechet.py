"""The Frechet distance against SciPy's matrix square root, and moments that do not depend on batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from srpo.evaluation.frechet import Gaussian, frechet_distance, gaussian
from srpo.evaluation.metrics import FittedGaussian


def textbook(one: Gaussian, other: Gaussian) -> float:
    root = linalg.sqrtm(one.covariance @ other.covariance)
    shift = one.mean - other.mean
    return float(shift @ shift + np.trace(one.covariance + other.covariance - 2 * np.real(root)))


def sample(seed: int, count: int, dim: int, stretch: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) * stretch + rng.normal(size=dim)).astype("f4")


@pytest.mark.parametrize(("count", "dim"), [(500, 16), (300, 128), (40, 2)])
def test_equals_scipys_sqrtm(count: int, dim: int) -> None:
    one, other = gaussian(sample(0, count, dim)), gaussian(sample(1, count + 7, dim, 1.3))
    assert frechet_distance(one, other) == pytest.approx(textbook(one, other), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-6)


def test_fewer_images_than_dimensions() -> None:
    """Singular covariances: the trace is the nuclear norm of the centred sets' product, which needs no root."""
    x, y = sample(0, 40, 96), sample(1, 30, 96)
    centred = [s.astype(float) - s.mean(axis=0, dtype=float) for s in (x, y)]
    trace = np.linalg.norm(centred[0] @ centred[1].T, "nuc") / np.sqrt(39 * 29)
    one, other = gaussian(x), gaussian(y)
    shift = one.mean - other.mean
    expected = shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * trace
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_known_values() -> None:
    one = Gaussian(np.zeros(2), np.diag([1.0, 4.0]))
    assert frechet_distance(one, one) == 0
    assert frechet_distance(one, Gaussian(np.array([3.0, 4.0]), np.diag([1.0, 4.0]))) == pytest.approx(25)
    assert frechet_distance(one, Gaussian(np.zeros(2), np.diag([9.0, 4.0]))) == pytest.approx((3 - 1) ** 2)


@given(cuts=st.lists(st.integers(0, 50), max_size=6), offset=st.sampled_from([0.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_streaming_equals_one_batch(cuts: list[int], offset: float) -> None:
    features = np.random.default_rng(0).normal(size=(50, 5)) + offset
    fit = FittedGaussian(5)
    for part in np.split(features, sorted(cuts)):
        fit.update(torch.from_numpy(part))
    found = fit.gaussian()
    assert fit.moments[0] == 50
    assert np.allclose(found.mean, features.mean(axis=0), rtol=1e-14)
    # plain sums of squares in float64 would be off by 1e-6 at this offset
    assert np.allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
