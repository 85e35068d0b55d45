"""Selection: the argmax, ties and odd scores. Properties over arbitrary tables."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.config.schema import SelectParams
from srpo.selection.best_of_n import choose_winners

scores = st.one_of(st.integers(-5, 5).map(float), st.just(math.nan), st.just(math.inf), st.just(-math.inf))
tables = st.dictionaries(st.sampled_from("abcdef"), st.lists(scores, min_size=1, max_size=6), min_size=1)


def frame(table: dict[str, list[float]], order: list[int] | None = None) -> pl.DataFrame:
    rows = [
        {"candidate_id": f"{prompt}-{i}", "prompt_id": prompt, "index": i, "reward": value}
        for prompt, values in table.items()
        for i, value in enumerate(values)
    ]
    return pl.DataFrame([rows[i] for i in order] if order else rows)


@settings(max_examples=200, deadline=None)
@given(tables, st.randoms(use_true_random=False))
def test_winner_is_the_first_argmax(table, rng) -> None:
    count = sum(map(len, table.values()))
    order = rng.sample(range(count), count)
    winners = {
        row["prompt_id"]: row for row in choose_winners(frame(table, order), {"reward": 1.0}, SelectParams()).to_dicts()
    }
    for prompt, values in table.items():
        usable = [value for value in values if math.isfinite(value)]
        if not usable:
            assert prompt not in winners
            continue
        best = values.index(max(usable))
        assert winners[prompt]["candidate_id"] == f"{prompt}-{best}"
        assert winners[prompt]["margin"] >= 0
        loser = winners[prompt]["loser_id"].split("-")
        assert values[int(loser[1])] == min(usable)


@settings(max_examples=50, deadline=None)
@given(tables, st.integers(0, 9))
def test_low_temperature_draws_the_best(table, seed) -> None:
    best = choose_winners(frame(table), {"reward": 1.0}, SelectParams())
    drawn = choose_winners(frame(table), {"reward": 1.0}, SelectParams(temperature=0.01), seed)
    assert drawn["selection_score"].equals(best["selection_score"])
    assert drawn["margin"].equals(best["margin"])


@settings(max_examples=50, deadline=None)
@given(tables, st.integers(0, 9), st.randoms(use_true_random=False))
def test_draws_depend_on_seed_and_id_alone(table, seed, rng) -> None:
    warm = SelectParams(temperature=3.0)
    order = rng.sample(range(sum(map(len, table.values()))), sum(map(len, table.values())))
    whole = choose_winners(frame(table, order), {"reward": 1.0}, warm, seed)
    for prompt, values in table.items():
        alone = choose_winners(frame({prompt: values}), {"reward": 1.0}, warm, seed)
        assert alone.equals(whole.filter(pl.col("prompt_id") == prompt))


def test_draws_follow_the_softmax_of_the_score() -> None:
    """Prompts whose drawn winner is below their mean are dropped, so the two candidates above it are counted."""
    table = {f"p{number:04d}": [0.0, 2.0, 3.0] for number in range(3000)}
    drawn = choose_winners(frame(table), {"reward": 1.0}, SelectParams(temperature=2.0), seed=1)
    share = drawn.filter(pl.col("selection_score") == 3.0).height / drawn.height
    assert abs(share - 1 / (1 + math.exp(-0.5))) < 0.03
    assert drawn.height / len(table) == pytest.approx(1 - 1 / (1 + math.exp(1.0) + math.exp(1.5)), abs=0.03)
    other = choose_winners(frame(table), {"reward": 1.0}, SelectParams(temperature=2.0), seed=2)
    assert not other.equals(drawn)


@settings(max_examples=100, deadline=None)
@given(tables, st.floats(0.05, 1.0))
def test_top_fraction_keeps_the_largest_margins(table, fraction) -> None:
    everyone = choose_winners(frame(table), {"reward": 1.0}, SelectParams())
    kept = choose_winners(frame(table), {"reward": 1.0}, SelectParams(top_fraction=fraction))
    if everyone.height:
        assert kept.height == max(1, round(fraction * everyone.height))
        dropped = everyone.join(kept, on="candidate_id", how="anti")
        if dropped.height:
            assert kept["margin"].min() >= dropped["margin"].max()


def test_min_margin_drops_prompts() -> None:
    table = {"a": [1.0, 1.0], "b": [0.0, 2.0]}
    kept = choose_winners(frame(table), {"reward": 1.0}, SelectParams(min_margin=0.5))
    assert kept["prompt_id"].to_list() == ["b"]


def test_rewards_are_combined_as_z_scores() -> None:
    """A reward in thousands must not drown one in tenths, and a constant one has no say."""
    rows = pl.DataFrame(
        {
            "candidate_id": ["x", "y", "z"],
            "prompt_id": ["a"] * 3,
            "index": [0, 1, 2],
            "large": [1000.0, 1001.0, 1000.0],
            "small": [0.1, 0.1, 0.9],
            "flat": [5.0, 5.0, 5.0],
        }
    )
    weights = {"large": 1.0, "small": 2.0, "flat": 50.0}
    assert choose_winners(rows, weights, SelectParams())["candidate_id"].to_list() == ["z"]


@settings(max_examples=100, deadline=None)
@given(tables, st.floats(0.05, 1.0))
def test_advantage_weights_have_mean_one(table, fraction) -> None:
    chosen = {
        weighting: choose_winners(
            frame(table), {"reward": 1.0}, SelectParams(top_fraction=fraction, weighting=weighting)
        )
        for weighting in ("uniform", "advantage")
    }
    assert chosen["uniform"].drop("weight").equals(chosen["advantage"].drop("weight"))
    assert set(chosen["uniform"]["weight"]) <= {1.0}
    weights, margins = chosen["advantage"]["weight"], chosen["advantage"]["margin"]
    assert weights.sum() == pytest.approx(len(weights))
    if margins.sum():
        assert weights.to_list() == pytest.approx((margins * (len(margins) / margins.sum())).to_list())
    else:
        assert set(weights) <= {1.0}
