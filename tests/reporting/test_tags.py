"""Scores by tag: means over the images of a tag's prompts, where they say something."""

from __future__ import annotations

import polars as pl
import pytest

from srpo.data.prompts import Prompt
from srpo.reporting.tags import scores_by_tag


def prompts(tag: str, values: list[str]) -> list[Prompt]:
    return [Prompt(f"{i:02}", f"prompt {i}", {tag: value}) for i, value in enumerate(values)]


def scores(values: list[float]) -> pl.DataFrame:
    """Two images per prompt, the second one worse by 2."""
    rows = [(f"{i:02}", value - 2 * j) for i, value in enumerate(values) for j in range(2)]
    return pl.DataFrame(rows, schema=["prompt_id", "reward"], orient="row")


def test_means_are_over_the_tags_images() -> None:
    table = scores_by_tag(
        prompts("color", ["red"] * 3 + ["blue"] * 4), scores([0.0] * 7), scores([3, 4, 5, 10, 10, 10, 30]), ["reward"]
    )
    blue, red = table["color"]
    assert (blue.value, blue.prompts, blue.scores) == ("blue", 4, {"reward": (-1.0, 14.0)})
    assert (red.value, red.prompts, red.scores) == ("red", 3, {"reward": (-1.0, 3.0)})


def test_scores_that_are_nan_are_left_out() -> None:
    table = scores_by_tag(
        prompts("color", ["red"] * 3 + ["blue"] * 3),
        scores([float("nan")] * 3 + [1.0] * 3),
        scores([5.0, 7.0, float("nan"), 1.0, 1.0, 1.0]),
        ["reward"],
    )
    assert table["color"][1].scores["reward"] == (None, pytest.approx(5.0))


@pytest.mark.parametrize(
    "values",
    [
        ["red"] * 7,  # one kind only
        ["red"] * 5 + ["blue"] * 2,  # too few of the other
        [f"author {i // 3}" for i in range(3 * 31)],  # no kinds
    ],
)
def test_tags_that_say_nothing_have_no_table(values: list[str]) -> None:
    ones = scores([1.0] * len(values))
    assert scores_by_tag(prompts("tag", values), ones, ones, ["reward"]) == {}
