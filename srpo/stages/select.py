"""Stage `select`: each prompt's winner, the best candidate or one drawn by its score."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import polars as pl

from srpo.data import parquet
from srpo.data.scores import read_scores
from srpo.errors import UserError
from srpo.rounds import Round
from srpo.selection.audit import AUDITED_COLUMNS, audit
from srpo.selection.best_of_n import choose_winners, odd_scores
from srpo.selection.picks import check_images, picked_winners, read_picks
from srpo.selection.winners import write_winners
from srpo.storage.files import publish
from srpo.storage.json_files import write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger(__name__)


def select(round: Round) -> None:
    """Write `rounds/<key>/winners/`: the winners with all columns that training needs, and `selection.json`.

    `selection.json` also counts invalid candidates, unfinished ones (a selecting reward is null) and, per selecting
    reward, scores that are NaN or infinite and prompts for which it is constant (`odd_scores`). After early rejection
    it includes the numbers of `audit`.

    Raises:
        UserError: no candidate is left, or scores and candidates do not match.
    """
    files = round.files
    settings = round.params.select
    weights = {name: round.params.rewards[name].weight for name in round.params.reward_names("select")}
    scores = read_scores(files.scores, dict.fromkeys(weights, "select")).lazy()
    valid = scores.filter(pl.col("invalid").not_().fill_null(True)).drop("invalid")
    counts = _counts(scores, weights)
    oddities = odd_scores(valid, weights)
    _report_oddities(round.key, counts["invalid"], oddities, weights)
    picks = read_picks(round.root / settings.picks, round.key) if settings.picks else {}
    unpicked = valid.filter(~pl.col("prompt_id").is_in(list(picks))) if picks else valid
    winners = choose_winners(unpicked, weights, settings, round.params.seed)
    if picks:
        check_images(picks, files.candidates)
        picked = picked_winners(valid, weights, settings, picks)
        winners = pl.concat([winners, picked.select(winners.columns)]).sort("prompt_id")
        counts |= {"picked": picked.height, "all_bad": sum(pick.picked is None for pick in picks.values())}
    if winners.is_empty():
        raise UserError(
            f"rounds.{round.key}.select: no winner is left of {counts['candidates']} candidates ({counts['invalid']}"
            " invalid); lower min_margin, change combine, or check the scores"
        )
    scratch = scratch_folder(round.root, "select", round.key)
    for leftover in scratch.iterdir():  # a killed run may have written more shards
        leftover.unlink()
    try:
        write_winners(scratch, winners, files.candidates)
    except KeyError:
        raise UserError(f"{files.scores}: does not match the candidates in {files.candidates}; rerun score") from None
    summary: dict[str, float | int | None] = {**counts, "winners": winners.height, **oddities}
    summary |= {f"candidates_{name}": value for name, value in _means(scores, weights).items()}
    summary |= {f"winners_{name}": value for name, value in _means(winners.lazy(), weights).items()}
    generated = round.params.generate
    if generated.early_rejection:
        summary |= audit(parquet.scan(files.candidates, AUDITED_COLUMNS), scores.collect(), generated)
    write_json(scratch / "selection.json", summary)
    publish(scratch, files.winners)
    log.info(
        "select %s: %d winners of %d candidates for %d prompts",
        *(round.key, winners.height, counts["candidates"], counts["prompts"]),
    )


def _counts(scores: pl.LazyFrame, weights: Mapping[str, float]) -> dict[str, int]:
    unfinished = pl.any_horizontal(pl.col(list(weights)).is_null())
    counts = {
        "prompts": pl.col("prompt_id").n_unique(),
        "candidates": pl.len(),
        "invalid": (pl.col("invalid") & ~unfinished).sum(),
        "unfinished": unfinished.sum(),
    }
    return scores.select(**counts).collect(engine="streaming").row(0, named=True)


def _means(scores: pl.LazyFrame, names: Iterable[str]) -> dict[str, float | None]:
    """Return the means of the finite scores: JSON has no NaN."""
    means = scores.select(pl.col(name).filter(pl.col(name).is_finite()).mean() for name in names)
    return means.collect().row(0, named=True)


def _report_oddities(key: str, invalid: int, odd: dict[str, int], weights: Mapping[str, float]) -> None:
    parts = [f"{invalid} invalid candidates (single-color images, or latents with NaN or infinity)"] if invalid else []
    for name in weights:
        if count := odd[f"not_finite_{name}"]:
            parts.append(f"{name} is NaN or infinite for {count} candidates")
        if count := odd[f"constant_prompts_{name}"]:
            parts.append(f"{name} is constant for {count} prompts")
    if parts:
        log.warning("select %s: %s", key, "; ".join(parts))
