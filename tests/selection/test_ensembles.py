"""Several selecting rewards: what every way of combining them promises, over arbitrary tables."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.config.schema import SelectParams
from srpo.selection.best_of_n import choose_winners, odd_scores

MODES = ["zscore", "rank", "beats_mean"]
numbers = st.integers(-9, 9).map(float)
odd = st.one_of(numbers, numbers, st.sampled_from([math.nan, math.inf, -math.inf]))
WEIGHTS = {"a": 1.0, "b": 2.0}


def tables(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(
        st.sampled_from("pqr"), st.lists(st.tuples(values, values), min_size=1, max_size=6), min_size=1
    )


def frame(table: dict[str, list[tuple[float, float]]], schema: dict | None = None) -> pl.DataFrame:
    rows = [
        {"candidate_id": f"{prompt}-{i}", "prompt_id": prompt, "index": i, "a": a, "b": b}
        for prompt, pairs in table.items()
        for i, (a, b) in enumerate(pairs)
    ]
    return pl.DataFrame(rows, schema=schema)


def chosen(rows: pl.DataFrame, mode: str, weights: dict[str, float] = WEIGHTS) -> dict[str, str]:
    winners = choose_winners(rows, weights, SelectParams(combine=mode))
    return dict(winners.select("prompt_id", "candidate_id").iter_rows())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(odd))
def test_nonfinite_scores_never_win(mode: str, table) -> None:
    rows = frame(table)
    clean = rows.filter(pl.all_horizontal(pl.col("a", "b").is_finite()))
    assert chosen(rows, mode) == chosen(clean, mode)
    winners = rows.filter(pl.col("candidate_id").is_in(list(chosen(rows, mode).values())))
    assert winners["a"].is_finite().all() and winners["b"].is_finite().all()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(numbers))
def test_one_reward_is_its_own_argmax(mode: str, table) -> None:
    plain = choose_winners(frame(table), {"a": 3.0}, SelectParams())
    assert choose_winners(frame(table), {"a": 3.0}, SelectParams(combine=mode)).equals(plain)
    assert plain["selection_score"].to_list() == plain["a"].to_list()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(numbers))
def test_the_best_on_every_reward_wins(mode: str, table) -> None:
    for pairs in table.values():
        pairs.append((10.0, 10.0))
    assert chosen(frame(table), mode) == {prompt: f"{prompt}-{len(pairs) - 1}" for prompt, pairs in table.items()}


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(numbers))
def test_units_do_not_matter(mode: str, table) -> None:
    """Powers of two, so that scaling itself rounds nothing. (Equal z-scores may still round apart: not the ids.)"""
    rows = frame(table)
    scaled = rows.with_columns(pl.col("a") * 1024 + 4096, pl.col("b") / 64)
    one, two = (choose_winners(each, WEIGHTS, SelectParams(combine=mode)) for each in (rows, scaled))
    assert one["prompt_id"].to_list() == two["prompt_id"].to_list()
    for column in ("selection_score", "margin"):
        assert one[column].to_list() == pytest.approx(two[column].to_list(), abs=1e-9)


def by_hand(pairs: list[tuple[float | None, float | None]], mode: str) -> dict[int, tuple[float, bool]]:
    """One prompt in plain Python: by index of the usable candidates the selection score, and whether it may win."""
    usable = {i: pair for i, pair in enumerate(pairs) if all(v is not None and math.isfinite(v) for v in pair)}
    scores, count = dict.fromkeys(usable, 0.0), len(usable)
    allowed = dict.fromkeys(usable, True)
    for column, weight in enumerate(WEIGHTS.values()):
        values = {i: pair[column] for i, pair in usable.items()}
        varies = len(set(values.values())) > 1
        mean = sum(values.values()) / count if count else 0.0
        for i, value in values.items():
            below = sum(v < value for v in values.values())
            equal = sum(v == value for v in values.values())
            if mode == "rank":
                share = (below + (equal - 1) / 2) / (count - 1) if varies else 0.5
                scores[i] += weight * share / sum(WEIGHTS.values())
            elif varies:
                scores[i] += weight * (value - mean) / math.sqrt(sum((v - mean) ** 2 for v in values.values()) / count)
            if mode == "beats_mean" and varies:
                allowed[i] &= value > mean
    return {i: (scores[i], allowed[i]) for i in usable}


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(st.one_of(odd, st.none())), rng=st.randoms(use_true_random=False))
def test_modes_equal_plain_python(mode: str, table, rng) -> None:
    """Whatever the order of rows, and with scores that are null. Sums may round apart, so near ties are ties here."""
    schema = {"candidate_id": pl.String, "prompt_id": pl.String, "index": pl.Int32, "a": pl.Float32, "b": pl.Float32}
    rows = frame(table, schema)
    order = rng.sample(range(rows.height), rows.height)
    found = choose_winners(rows, WEIGHTS, SelectParams(combine=mode))
    assert found.equals(choose_winners(rows[order], WEIGHTS, SelectParams(combine=mode)))
    winners = {row["prompt_id"]: row for row in found.to_dicts()}
    for prompt, pairs in table.items():
        known = by_hand(pairs, mode)
        able = {i: score for i, (score, allowed) in known.items() if allowed}
        if not able:
            assert prompt not in winners
            continue
        mean = sum(score for score, _ in known.values()) / len(known)
        if prompt not in winners:
            assert max(able.values()) <= mean + 1e-9
            continue
        row = winners[prompt]
        loser = int(row["loser_id"].split("-")[1])
        assert able[row["index"]] == pytest.approx(max(able.values())) == pytest.approx(row["selection_score"])
        assert row["margin"] == pytest.approx(max(able.values()) - mean, abs=1e-9)
        assert known[loser][0] == pytest.approx(min(score for score, _ in known.values()))
        assert pairs.index(pairs[row["index"]]) == row["index"], "ties go to the lowest index"
        assert len(pairs) - 1 - pairs[::-1].index(pairs[loser]) == loser, "the loser's to the highest"


@settings(max_examples=80, deadline=None)
@given(table=tables(numbers))
def test_ranks_depend_on_order_alone(table) -> None:
    rows = frame(table)
    assert chosen(rows, "rank") == chosen(rows.with_columns(pl.col("a").exp(), pl.col("b") ** 3), "rank")


@settings(max_examples=80, deadline=None)
@given(table=tables(numbers))
def test_beats_mean_needs_all_rewards(table) -> None:
    found = chosen(frame(table), "beats_mean")
    for prompt, pairs in table.items():
        means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
        spread = [max(column) > min(column) for column in zip(*pairs, strict=True)]
        good = {
            f"{prompt}-{i}"
            for i, pair in enumerate(pairs)
            if all(value > mean + 1e-12 or not varies for value, mean, varies in zip(pair, means, spread, strict=True))
        }
        assert (found.get(prompt) in good) if good else prompt not in found


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(table=tables(numbers), value=numbers)
def test_constant_rewards_are_ignored(mode: str, table, value: float) -> None:
    rows = frame(table).with_columns(pl.lit(value).alias("b"))
    assert chosen(rows, mode) == chosen(rows, mode, {"a": 1.0})


def test_modes_can_disagree() -> None:
    """One reward is wild about x; the ranks only see a first place and a last one."""
    rows = frame({"p": [(9.0, 0.0), (1.0, 2.0), (0.0, 1.0)]})
    weights = {"a": 1.5, "b": 1.0}
    assert chosen(rows, "zscore", weights) == {"p": "p-0"}
    assert chosen(rows, "rank", weights) == {"p": "p-1"}
    assert chosen(rows, "beats_mean", weights) == {}


def test_units_of_scores_and_margins() -> None:
    rows = frame({"p": [(0.0, 5.0), (2.0, 7.0)]})
    by_z = choose_winners(rows, WEIGHTS, SelectParams()).row(0, named=True)
    assert (by_z["selection_score"], by_z["margin"], by_z["loser_id"]) == (3.0, 3.0, "p-0")
    by_rank = choose_winners(rows, WEIGHTS, SelectParams(combine="rank")).row(0, named=True)
    assert (by_rank["selection_score"], by_rank["margin"]) == (1.0, 0.5)


def test_odd_scores_are_counted() -> None:
    """A null is no odd score but none at all: the candidate was not finished."""
    rows = frame(
        {"p": [(1.0, math.nan), (1.0, 2.0), (None, None)], "q": [(1.0, 2.0), (2.0, math.inf)], "r": [(3.0, 3.0)]}
    )
    assert odd_scores(rows, WEIGHTS) == {
        "not_finite_a": 0, "constant_prompts_a": 1, "not_finite_b": 2, "constant_prompts_b": 0,
    }  # fmt: skip
