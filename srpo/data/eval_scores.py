"""Scores of held-out images: `per_prompt.parquet` of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from srpo.data import parquet
from srpo.data.records import HasEvaluation


def read_eval_scores(files: HasEvaluation, rewards: Iterable[str]) -> pl.DataFrame:
    """Read `prompt_id`, `index`, `guidance` and one column per reward, a row per image and guidance scale.

    Raises:
        UserError: the file is missing or damaged.
    """
    return parquet.table(files.evaluation / "per_prompt.parquet", ["prompt_id", "index", "guidance", *rewards])


def at_guidance(scores: pl.DataFrame, guidance: float) -> pl.DataFrame:
    """Return the rows of one guidance scale, sorted by prompt and index; the column is float32."""
    return scores.filter((pl.col("guidance") - guidance).abs() < 1e-4).sort("prompt_id", "index")
