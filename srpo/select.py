"""Stage `select`: keep each prompt's best candidate. No torch in here."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import pyarrow as pa

from srpo import datasets
from srpo.base import write_json
from srpo.errors import UserError
from srpo.params import Params
from srpo.rounds import RoundFiles
from srpo.scratch import scratch_folder
from srpo.sections import SelectParams

log = logging.getLogger("srpo")
WINNERS_PER_SHARD = 2048


def select(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/winners/`: the winners with all that training needs, and `selection.json`.

    `loser_latents` are the latents of the prompt's worst candidate, null if that is the winner itself or has none.
    `selection.json` also counts what could not win or had no say: rejected candidates, and for every selecting
    reward its scores that are NaN or infinite and the prompts for which it is constant.

    Raises:
        UserError: no candidate is left, or scores and candidates do not belong together.
    """
    files, settings = RoundFiles(root, key), params.for_round(key).select
    scores = pl.read_parquet(files.scores)
    if "rejected" not in scores.columns:
        raise UserError(f"{files.scores}: has no column `rejected`, as older versions wrote it; rerun score")
    weights = {name: params.rewards[name].weight for name in params.reward_names("select")}
    sound = scores.filter(~pl.col("rejected"))
    winners = choose_winners(sound, weights, settings)
    prompts = scores["prompt_id"].n_unique()
    rejected, odd = scores.height - sound.height, odd_scores(sound, weights)
    _report_oddities(key, rejected, odd, weights)
    if winners.is_empty():
        raise UserError(
            f"rounds.{key}.select: no winner is left of {scores.height} candidates ({rejected} rejected);"
            " loosen min_margin or combine, or look at the scores"
        )
    by_id = {row["candidate_id"]: row for row in winners.drop("rejected").to_dicts()}
    scratch = scratch_folder(root, "select", key, "redone from the start")
    fields = datasets.CANDIDATE_FIELDS | dict.fromkeys(params.rewards, pa.float32())
    fields |= dict.fromkeys(("selection_score", "margin", "weight"), pa.float32()) | {"loser_id": pa.string()}
    fields |= {"loser_latents": datasets.LATENTS}
    found = 0
    for number, shard in enumerate(_full_rows(files.candidates, by_id)):
        datasets.write_table(scratch / f"shard-{number:05d}.parquet", shard, fields)
        found += len(shard)
    if found != len(by_id):
        raise UserError(f"{files.scores}: scores of other candidates than {files.candidates} holds; rerun score")
    summary = {"prompts": prompts, "candidates": scores.height, "winners": found, "rejected": rejected} | odd
    summary |= {f"candidates_{name}": _mean(scores[name]) for name in params.rewards}
    summary |= {f"winners_{name}": _mean(winners[name]) for name in params.rewards}
    write_json(scratch / "selection.json", summary)
    datasets.publish(scratch, files.winners)
    log.info("select %s: %d winners of %d candidates for %d prompts", key, found, scores.height, prompts)


def choose_winners(scores: pl.DataFrame, weights: dict[str, float], settings: SelectParams) -> pl.DataFrame:
    """One row per kept prompt: the scores of its best candidate, in prompt order.

    The selection score is the reward itself when one reward selects; when several do, `settings.combine` makes it
    of theirs. Ties go to the lowest index. A candidate with a NaN or infinite selecting reward can't win, nor does
    it count in its prompt's means and ranks. A reward that is constant for a prompt has nothing to say about it.

    Args:
        scores: columns prompt_id, candidate_id, index and the rewards.
        weights: by name of the selecting rewards.
        settings: `min_margin` drops prompts whose winner is hardly better than its prompt's mean; then
            `top_fraction` keeps the largest margins (at least one prompt).

    Returns:
        The columns of `scores`, and selection_score, margin (winner minus its prompt's mean), loser_id (the worst
        candidate) and weight: 1, or with `weighting: advantage` the margin over the mean of the kept margins.
    """
    usable = scores.filter(pl.all_horizontal(pl.col(list(weights)).is_finite()))
    ranked = usable.with_columns(_selection_score(weights, settings.combine).alias("selection_score")).sort(
        ["prompt_id", "selection_score", "index"], descending=[False, True, False]
    )
    margin = pl.col("selection_score") - pl.col("selection_score").mean().over("prompt_id")
    winners = (
        ranked.with_columns(
            margin.alias("margin"),
            pl.col("candidate_id").last().over("prompt_id").alias("loser_id"),
        )
        .filter(_eligible(weights, settings.combine))
        .group_by("prompt_id", maintain_order=True)
        .first()
        .filter(pl.col("margin") >= settings.min_margin)
    )
    keep = max(1, round(settings.top_fraction * winners.height))
    best = winners.sort(["margin", "prompt_id"], descending=[True, False]).head(keep)
    return best.sort("prompt_id").with_columns(_weight(best, settings.weighting).alias("weight"))


def odd_scores(scores: pl.DataFrame, weights: dict[str, float]) -> dict[str, int]:
    """By selecting reward: `not_finite_<name>`, its scores that are NaN or infinite, and
    `constant_prompts_<name>`, the prompts for which the rest are all equal."""
    found: dict[str, int] = {}
    for name in weights:
        finite = scores.filter(pl.col(name).is_finite())
        found[f"not_finite_{name}"] = scores.height - finite.height
        spread = finite.group_by("prompt_id").agg(pl.len(), (pl.col(name).max() - pl.col(name).min()).alias("spread"))
        # a lone candidate says nothing about the reward
        found[f"constant_prompts_{name}"] = spread.filter((pl.col("spread") == 0) & (pl.col("len") > 1)).height
    return found


def _weight(winners: pl.DataFrame, weighting: str) -> pl.Expr:
    # where nothing stands out anywhere there is nothing to weight by
    if weighting == "uniform" or not winners["margin"].sum():
        return pl.lit(1.0)
    return pl.col("margin") / pl.col("margin").mean()


def _selection_score(weights: dict[str, float], combine: str) -> pl.Expr:
    if len(weights) == 1:
        return pl.col(next(iter(weights))).cast(pl.Float64)
    if combine == "rank":
        return sum(weight * _rank(name) for name, weight in weights.items()) / sum(weights.values())
    return sum((weight * _z_score(name) for name, weight in weights.items()), start=pl.lit(0.0))


def _z_score(name: str) -> pl.Expr:
    column = pl.col(name).cast(pl.Float64)
    z = (column - column.mean().over("prompt_id")) / column.std(ddof=0).over("prompt_id")
    return pl.when(_constant(name)).then(0.0).otherwise(z)


def _rank(name: str) -> pl.Expr:
    """0 for the worst of the prompt, 1 for the best; equals share their mean rank."""
    rank = (pl.col(name).rank("average").over("prompt_id") - 1) / (pl.len().over("prompt_id") - 1)
    return pl.when(_constant(name)).then(0.5).otherwise(rank)


def _eligible(weights: dict[str, float], combine: str) -> pl.Expr:
    if combine != "beats_mean" or len(weights) == 1:
        return pl.lit(True)
    columns = {name: pl.col(name).cast(pl.Float64) for name in weights}
    return pl.all_horizontal(
        _constant(name) | (column > column.mean().over("prompt_id")) for name, column in columns.items()
    )


def _constant(name: str) -> pl.Expr:
    return pl.col(name).max().over("prompt_id") == pl.col(name).min().over("prompt_id")


def _report_oddities(key: str, rejected: int, odd: dict[str, int], weights: dict[str, float]) -> None:
    parts = [f"{rejected} candidates rejected as no pictures"] if rejected else []
    for name in weights:
        if count := odd[f"not_finite_{name}"]:
            parts.append(f"{name} is NaN or infinite for {count} candidates")
        if count := odd[f"constant_prompts_{name}"]:
            parts.append(f"{name} is constant for {count} prompts")
    if parts:
        log.warning("select %s: %s", key, "; ".join(parts))


def _mean(scores: pl.Series) -> float | None:
    """Over the finite scores: JSON has no NaN."""
    return scores.filter(scores.is_finite()).mean()


def _full_rows(candidates: Path, winners: dict[str, dict]):
    losers = {winner["loser_id"] for winner in winners.values()} - set(winners)
    latents = {
        row["candidate_id"]: row["latents"]
        for row in datasets.read_rows(candidates, ["candidate_id", "latents"])
        if row["candidate_id"] in losers
    }
    shard: list[dict] = []
    for row in datasets.read_rows(candidates):
        if row["candidate_id"] in winners:
            winner = winners[row["candidate_id"]]
            shard.append(winner | row | {"loser_latents": latents.get(winner["loser_id"])})
            if len(shard) == WINNERS_PER_SHARD:
                yield shard
                shard = []
    if shard:
        yield shard
