"""Means, win rates and diversity with their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.evaluation.bootstrap import Estimate, mean_interval, win_rate
from srpo.evaluation.diversity import diversity


def test_bootstrap_draws_prompts() -> None:
    rng = np.random.default_rng(0)
    per_prompt = rng.normal(size=60)
    names = [f"p{i // 5}" for i in range(300)]
    copies = mean_interval(np.repeat(per_prompt, 5), names)  # five equal images know no more than one
    single = mean_interval(per_prompt, [f"p{i}" for i in range(60)])
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=1e-9)
    blind = mean_interval(np.repeat(per_prompt, 5), [str(i) for i in range(300)])
    assert copies.high - copies.low > 1.8 * (blind.high - blind.low)


def test_agrees_with_a_written_out_bootstrap() -> None:
    rng = np.random.default_rng(1)
    by_prompt = {f"p{i}": rng.normal(size=size) for i, size in enumerate(rng.integers(1, 6, 30))}
    values, names = np.concatenate(list(by_prompt.values())), [n for n, v in by_prompt.items() for _ in v]
    means = []
    for _ in range(4000):
        drawn = [by_prompt[f"p{i}"] for i in rng.integers(30, size=30)]
        means.append(np.concatenate(drawn).mean())
    found = mean_interval(values, names)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.03)


def test_interval_coverage() -> None:
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(size=40), 3) + 0.5 * rng.normal(size=120)
        found = mean_interval(values, [f"p{i // 3}" for i in range(120)])
        held += found.low <= 0 <= found.high
    assert 0.9 <= held / 300 <= 0.98


@given(st.permutations(range(12)))
@settings(max_examples=25, deadline=None)
def test_row_order_does_not_matter(order: list[int]) -> None:
    values, names = np.arange(12.0) ** 2, np.array([f"p{i % 4}" for i in range(12)])
    assert mean_interval(values[order], names[order]) == pytest.approx(mean_interval(values, names))


def test_win_rate() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 3.0]), np.array([0.0, 2.0, 4.0, 1.0])
    names = ["a", "b", "c", "d"]
    assert win_rate(one, other, names).value == 0.625
    assert win_rate(one, one, names) == Estimate(0.5, 0.5, 0.5)
    gaps = np.array([np.nan, 2.0, 3.0, np.inf])
    assert win_rate(gaps, other, names).value == 0.25, "a tie and a loss"
    assert win_rate(np.full(4, np.nan), other, names) == Estimate(0.5, 0, 1)
    forth, back = win_rate(one, other, names), win_rate(other, one, names)
    assert (forth.low, forth.high) == pytest.approx((1 - back.high, 1 - back.low))


def test_diversity() -> None:
    features = np.array([[1.0, 0], [0, 2], [1, 0], [3, 0], [0, 1]])
    assert diversity(features, ["a", "a", "b", "b", "alone"]).value == pytest.approx((1 + 0) / 2)
    assert diversity(features, list("abcde")) is None
    assert Estimate(2.0, 1.0, 3.0).flat("kid") == {"kid": 2.0, "kid_low": 1.0, "kid_high": 3.0}
