"""Alpha against the published example, win rates, agreement with rewards, and the tables.

python -m pytest tests/review/test_agreement.py
"""

from __future__ import annotations

import math
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.cli import run
from srpo.review.agreement import human_win_rate, krippendorff_alpha, pick_agreement, same_choice, vote_agreement
from tests.review.conftest import pick, vote

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: four observers, twelve units; 0 is missing
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def test_alpha_is_that_of_the_published_example() -> None:
    units = [[value for value in unit if value] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.849, abs=5e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=4), max_size=6))
def test_alpha_by_its_definition(units: list[list[float]]) -> None:
    pairable = [unit for unit in units if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    expected = sum((a - b) ** 2 for a, b in permutations(values, 2))
    if not expected:
        assert krippendorff_alpha(units) is None
        return
    observed = sum(sum((a - b) ** 2 for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in pairable)
    assert krippendorff_alpha(units) == pytest.approx(1 - observed * (len(values) - 1) / expected)


def test_equal_votes_count_half() -> None:
    votes = [{"prompt_id": f"p{i % 4}", "value": value} for i, value in enumerate([1, 0.5, 0.5, 0, 1, 1, 0.5, 0.5])]
    found = human_win_rate(votes)
    assert found.value == 5 / 8 and found.low < found.value < found.high


def test_votes_agree_with_a_reward_by_its_sign() -> None:
    votes = [{"prompt_id": "p", "index": i, "value": value} for i, value in enumerate([1, 1, 0, 0, 0.5, 1])]
    differences = {("p", 0): 2.0, ("p", 1): -0.1, ("p", 2): -3.0, ("p", 3): 0.0, ("p", 4): 9.0, ("p", 5): math.nan}
    assert vote_agreement(votes, differences).value == (1 + 0 + 1 + 0.5) / 4
    assert vote_agreement([votes[4]], differences) is None


def test_picks_are_ranked_among_what_was_shown() -> None:
    shown = [{"candidate_id": name} for name in "abcd"]
    picks = [{"item": f"p{name}", "picked": name, "shown": shown} for name in ("a", "c", None)]
    above, best = pick_agreement(picks, {"a": 4.0, "b": 1.0, "c": 2.0, "d": 2.0, "e": 99.0})
    assert above.value == pytest.approx((3 / 3 + 1.5 / 3) / 2) and best.value == 0.5
    assert pick_agreement(picks, {}) is None


def test_raters_are_compared_where_they_met() -> None:
    rows = [("x", "1"), ("x", "1"), ("x", "2"), ("y", "1"), ("z", None), ("z", None)]
    found = same_choice([{"item": item, "picked": value} for item, value in rows], "picked")
    assert found == (4, 2 / 4) and len(list(combinations(range(3), 2))) + 1 == 4
    assert same_choice([], "picked") is None


def test_the_command_prints_who_agrees_with_whom(campaign: Path, open_review, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert run(["votes", "001"]) == 0
    assert "Nobody has compared" in capsys.readouterr().out
    client = open_review()
    scores = pl.read_parquet(campaign / "rounds/001/scores/judge/judge.parquet")
    best = scores.sort("judge").group_by("prompt_id").last()
    for row in best.iter_rows(named=True):
        pick(client, row["prompt_id"], row["candidate_id"])
    for rater in ("anna", "ben"):
        for _ in range(10):
            item = client.get("/compare", params={"rater": rater}).url.params["item"]
            pair = client.get("/compare", params={"rater": rater, "item": item}).text
            vote(client, item, favorite(campaign, client, pair, rater), rater)
    assert run(["votes", "001"]) == 0
    printed = capsys.readouterr().out
    assert "Krippendorff's alpha is 1.00 over 10 pairs" in printed or "votes that differ" in printed
    assert "1.00 (1.00 to 1.00)" in row_of(printed, "anna") and "1.00 (1.00 to 1.00)" in row_of(printed, "all")
    above, same = row_of(printed.split("Rewards and picks")[1], "judge").split("1.00 (1.00 to 1.00)")[:2]
    assert "judge" in above and not same.strip(" │|")
    page = client.get("/results").text
    assert "<td>anna</td>" in page and "1.00 (1.00 to 1.00)" in page


def favorite(root: Path, client, page: str, rater: str) -> str:
    """Return the side with the less noisy image, which is the round's."""
    import io
    import re

    from PIL import Image

    def noise(side: str) -> float:
        data = client.get(re.search(rf'data-zoom="(/pair/\d+/{side}[^"]*)"', page)[1]).content
        pixels = np.asarray(Image.open(io.BytesIO(data)), float)
        return np.abs(np.diff(pixels, axis=0)).mean()

    return min(("left", "right"), key=noise)


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)
