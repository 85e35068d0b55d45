"""The metrics against torchmetrics' own, from the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from srpo.evaluation.frechet import gaussian
from srpo.evaluation.metrics import FittedGaussian, FrechetDistance, KernelDistance, MeanScore

DIM = 12


class Flatten(torch.nn.Module):
    """Stands in for Inception: the features are the pixels of a [3, 2, 2] image, as torchmetrics passes them on."""

    num_features = DIM

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.normal(size=(count, DIM)) @ rng.normal(size=(DIM, DIM)) + shift).astype(np.float32))


def torchmetrics_value(metric, x: torch.Tensor, y: torch.Tensor):
    for part in x.split(50):
        metric.update(part.reshape(-1, 3, 2, 2), real=False)
    metric.update(y.reshape(-1, 3, 2, 2), real=True)
    return metric.compute()


def test_fid_equals_torchmetrics() -> None:
    x, y = features(0, 300), features(1, 200, 0.5)
    metric = FrechetDistance(gaussian(y.numpy()))
    for part in x.split(70):
        metric.update(part)
    expected = torchmetrics_value(FrechetInceptionDistance(Flatten()).set_dtype(torch.float64), x, y)
    # both in float64; torchmetrics takes the eigenvalues of S1 S2, which is not symmetric
    assert metric.compute() == pytest.approx(float(expected), rel=1e-6)


def test_kid_equals_torchmetrics() -> None:
    x, y = features(0, 150), features(1, 150, 0.5)
    metric = KernelDistance(y.numpy())
    metric.update(x, torch.arange(150))
    # one subset as large as the sets: all pairs, whatever their order; its sums are in float32
    expected, _ = torchmetrics_value(KernelInceptionDistance(Flatten(), subsets=1, subset_size=150), x, y)
    assert metric.compute().value == pytest.approx(float(expected), rel=1e-4)


def test_moments_keep_their_digits_when_merged() -> None:
    x = features(0, 90).double() + 1e4
    fits = [FittedGaussian(DIM) for _ in range(4)]
    for fit, part in zip(fits[:3], x.split(30), strict=True):
        fit.update(part)
    for fit in fits[1:]:
        fits[0].merge_state(fit)  # the last one is empty
    assert np.allclose(fits[0].compute()[1], np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_states_survive_a_reset_and_a_copy() -> None:
    metric = MeanScore()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    before = metric.clone().compute()
    metric.reset()
    metric.update(torch.tensor([5.0, 5.0]), torch.tensor([0, 1]))
    assert (before.value, metric.compute().value) == (1.5, 5.0)
