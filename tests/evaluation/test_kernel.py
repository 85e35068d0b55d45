"""KID and CMMD against sums over pairs written out, against clean-fid, and their intervals against repetition."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from cleanfid import fid

from srpo.evaluation import kernel
from srpo.evaluation.kernel import cmmd, kid, paired_kid


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def rbf(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(1000 * np.exp(-((x - y) ** 2).sum() / 200))


def pairwise(x: np.ndarray, y: np.ndarray, k) -> float:
    """Unbiased MMD^2, pair by pair."""

    def within(z: np.ndarray) -> float:
        n = len(z)
        return sum(k(z[i], z[j]) for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def groups(count: int, size: int) -> list[str]:
    return [f"prompt {i // size}" for i in range(count)]


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 6)) + 0.5, rng.normal(size=(17, 6))


@pytest.mark.parametrize(("distance", "k"), [(kid, cubic), (cmmd, rbf)])
def test_equals_written_out_sums(sets, distance, k, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 5)  # blocks that cut through sets and prompts
    (x, y), names = sets, np.array(groups(24, 3))
    found = distance(x, y, list(names))
    assert found.value == pytest.approx(pairwise(x, y, k), rel=1e-9)
    left_x = np.array([pairwise(x[names != name], y, k) for name in np.unique(names)])
    left_y = np.array([pairwise(x, np.delete(y, i, axis=0), k) for i in range(len(y))])
    variance = sum((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum() for v in (left_x, left_y))
    assert found.high - found.value == pytest.approx(1.96 * np.sqrt(variance), rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_kid_equals_clean_fids(sets) -> None:
    # of equal sets no larger than a subset, each of clean-fid's random subsets is the whole set
    x, y = sets[0][:17], sets[1]
    assert kid(x, y, groups(17, 1)).value == pytest.approx(fid.kernel_distance(x, y, num_subsets=3))


def test_image_order_does_not_matter(sets) -> None:
    (x, y), names = sets, np.array(groups(24, 3))
    order = np.random.default_rng(1).permutation(24)
    assert np.allclose(kid(x, y, names), kid(x[order], y[::-1], names[order]), atol=1e-12)


def test_paired_kid_leaves_pairs_out(sets) -> None:
    x = sets[0]
    assert paired_kid(x, x) == 0
    y = x + np.random.default_rng(2).normal(size=x.shape)
    pairs = [(i, j) for i in range(24) for j in range(24) if i != j]
    by_hand = np.mean([cubic(x[i], x[j]) + cubic(y[i], y[j]) - 2 * cubic(x[i], y[j]) for i, j in pairs])
    assert paired_kid(x, y) == pytest.approx(by_hand)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_interval_coverage(shift: float) -> None:
    """95 % is the aim, with few prompts (40) whose images are alike."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = np.repeat(rng.normal(size=(40, 4)), 3, axis=0) * 0.7 + rng.normal(size=(120, 4)) * 0.7 + shift
        found.append(kid(x, rng.normal(size=(100, 4)), groups(120, 3)))
    truth = np.mean([estimate.value for estimate in found])
    held = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert 0.88 <= held <= 1.0
    if shift:  # the jackknife of a degenerate statistic is too wide, this one's is not
        assert held < 0.99
