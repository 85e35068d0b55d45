"""Stage `select`: keep each prompt's best candidate. No torch in here."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import pyarrow as pa

from srpo import datasets
from srpo.base import write_json
from srpo.errors import UserError
from srpo.params import Params, SelectParams
from srpo.rounds import RoundFiles
from srpo.scratch import scratch_folder

log = logging.getLogger("srpo")
WINNERS_PER_SHARD = 2048


def select(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/winners/`: the winners with all that training needs, and `selection.json`.

    Raises:
        UserError: no candidate is left, or scores and candidates do not belong together.
    """
    files, settings = RoundFiles(root, key), params.for_round(key).select
    scores = pl.read_parquet(files.scores)
    weights = {name: params.rewards[name].weight for name in params.reward_names("select")}
    winners = choose_winners(scores, weights, settings)
    if winners.is_empty():
        raise UserError(f"rounds.{key}.select: no winner is left of {scores.height} candidates; loosen min_margin")
    by_id = {row["candidate_id"]: row for row in winners.to_dicts()}
    scratch = scratch_folder(root, "select", key, "redone from the start")
    fields = datasets.CANDIDATE_FIELDS | dict.fromkeys(params.rewards, pa.float32())
    fields |= dict.fromkeys(("selection_score", "margin", "weight"), pa.float32()) | {"loser_id": pa.string()}
    found = 0
    for number, shard in enumerate(_full_rows(files.candidates, by_id)):
        datasets.write_table(scratch / f"shard-{number:05d}.parquet", shard, fields)
        found += len(shard)
    if found != len(by_id):
        raise UserError(f"{files.scores}: scores of other candidates than {files.candidates} holds; rerun score")
    prompts = scores["prompt_id"].n_unique()
    summary = {"prompts": prompts, "candidates": scores.height, "winners": found}
    summary |= {f"candidates_{name}": scores[name].mean() for name in params.rewards}
    summary |= {f"winners_{name}": winners[name].mean() for name in params.rewards}
    write_json(scratch / "selection.json", summary)
    datasets.publish(scratch, files.winners)
    log.info("select %s: %d winners of %d candidates for %d prompts", key, found, scores.height, prompts)


def choose_winners(scores: pl.DataFrame, weights: dict[str, float], settings: SelectParams) -> pl.DataFrame:
    """One row per kept prompt: the scores of its best candidate, in prompt order.

    The selection score is the reward itself when one reward selects, and the weighted sum of within-prompt
    z-scores when several do. Ties go to the lowest index. A candidate with a NaN or infinite selecting reward
    can't win.

    Args:
        scores: columns prompt_id, candidate_id, index and the rewards.
        weights: by name of the selecting rewards.
        settings: `min_margin` drops prompts whose winner is hardly better than its prompt's mean; then
            `top_fraction` keeps the largest margins (at least one prompt).

    Returns:
        The columns of `scores`, and selection_score, margin (winner minus its prompt's mean), weight (1.0)
        and loser_id (the worst candidate).
    """
    usable = scores.filter(pl.all_horizontal(pl.col(list(weights)).is_finite()))
    ranked = usable.with_columns(_selection_score(weights).alias("selection_score")).sort(
        ["prompt_id", "selection_score", "index"], descending=[False, True, False]
    )
    margin = pl.col("selection_score") - pl.col("selection_score").mean().over("prompt_id")
    winners = (
        ranked.with_columns(
            margin.alias("margin"),
            pl.lit(1.0).alias("weight"),
            pl.col("candidate_id").last().over("prompt_id").alias("loser_id"),
        )
        .group_by("prompt_id", maintain_order=True)
        .first()
        .filter(pl.col("margin") >= settings.min_margin)
    )
    keep = max(1, round(settings.top_fraction * winners.height))
    best = winners.sort(["margin", "prompt_id"], descending=[True, False]).head(keep)
    return best.sort("prompt_id")


def _selection_score(weights: dict[str, float]) -> pl.Expr:
    if len(weights) == 1:
        return pl.col(next(iter(weights))).cast(pl.Float64)

    def z(name: str) -> pl.Expr:
        column = pl.col(name).cast(pl.Float64)
        spread = column.std(ddof=0).over("prompt_id")
        # a reward that is constant for a prompt has nothing to say about it
        return pl.when(spread > 0).then((column - column.mean().over("prompt_id")) / spread).otherwise(0.0)

    return sum((weight * z(name) for name, weight in weights.items()), start=pl.lit(0.0))


def _full_rows(candidates: Path, winners: dict[str, dict]):
    shard: list[dict] = []
    for row in datasets.read_rows(candidates):
        if row["candidate_id"] in winners:
            shard.append(winners[row["candidate_id"]] | row)
            if len(shard) == WINNERS_PER_SHARD:
                yield shard
                shard = []
    if shard:
        yield shard
