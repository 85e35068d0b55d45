"""Mean scores by tag of the held-out prompts: where a round became better, and where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from srpo.data.prompts import Prompt

MIN_PROMPTS = 3  # fewer say nothing about a value
MAX_VALUES = 30  # more are no kinds of prompts


@dataclass(frozen=True)
class TagRow:
    """One value of a tag. `scores` has by reward the means of base's and of the round's images."""

    value: str
    prompts: int
    scores: dict[str, tuple[float | None, float | None]]


def scores_by_tag(
    prompts: Sequence[Prompt], base: pl.DataFrame, scores: pl.DataFrame, rewards: Sequence[str]
) -> dict[str, list[TagRow]]:
    """Return the rows of each tag that has several values with at least `MIN_PROMPTS` prompts.

    Args:
        base: `prompt_id` and one column per reward, a row per image, as in `scores`; NaN is left out.
    """
    tables: dict[str, list[TagRow]] = {}
    for tag in sorted({name for prompt in prompts for name in prompt.tags}):
        ids: dict[str, list[str]] = {}
        for prompt in prompts:
            if tag in prompt.tags:
                ids.setdefault(prompt.tags[tag], []).append(prompt.id)
        kinds = {value: found for value, found in sorted(ids.items()) if len(found) >= MIN_PROMPTS}
        if 1 < len(kinds) <= MAX_VALUES:
            tables[tag] = [
                TagRow(
                    value,
                    len(found),
                    {name: (_mean(base, found, name), _mean(scores, found, name)) for name in rewards},
                )
                for value, found in kinds.items()
            ]
    return tables


def _mean(scores: pl.DataFrame, ids: list[str], name: str) -> float | None:
    values = scores.filter(pl.col("prompt_id").is_in(ids))[name].fill_nan(None).drop_nulls()
    return float(values.to_numpy().mean(dtype=float)) if len(values) else None
