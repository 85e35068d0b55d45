"""Stage `select`: keep each prompt's best candidate, or one drawn by its score. No torch in here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import polars as pl

from srpo.data import parquet
from srpo.errors import UserError
from srpo.rounds import Round
from srpo.selection.audit import AUDITED_COLUMNS, audit
from srpo.selection.best_of_n import choose_winners, odd_scores
from srpo.selection.picks import check_images, picked_winners, read_picks
from srpo.selection.winners import write_winners
from srpo.storage.files import publish
from srpo.storage.json_files import write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger("srpo")


def select(round: Round) -> None:
    """Write `rounds/<key>/winners/`: the winners with all that training needs, and `selection.json`.

    `selection.json` also counts what could not win or had no say: invalid candidates, unfinished ones (a selecting
    reward is null), and for every selecting reward its scores that are NaN or infinite and the prompts for which it
    is constant. After early rejection it holds what `rejection.audit` found.

    Raises:
        UserError: no candidate is left, or scores and candidates do not belong together.
    """
    files, settings = round.files, round.params.select
    weights = {name: round.params.rewards[name].weight for name in round.params.reward_names("select")}
    scores = parquet.scan(files.scores, ["candidate_id", "prompt_id", "index", *round.params.rewards, "invalid"])
    sound = scores.filter(pl.col("invalid").not_().fill_null(True)).drop("invalid")
    summary = _counts(scores, weights)
    oddities = odd_scores(sound, weights)
    _report_oddities(round.key, summary["invalid"], oddities, weights)
    picks = read_picks(round.root / settings.picks, round.key) if settings.picks else {}
    rest = sound.filter(~pl.col("prompt_id").is_in(list(picks))) if picks else sound
    winners = choose_winners(rest, weights, settings, round.params.seed)
    if picks:
        check_images(picks, files.candidates)
        picked = picked_winners(sound, weights, settings, picks)
        winners = pl.concat([winners, picked.select(winners.columns)]).sort("prompt_id")
        summary |= {"picked": picked.height, "all_bad": sum(pick.picked is None for pick in picks.values())}
    if winners.is_empty():
        raise UserError(
            f"rounds.{round.key}.select: no winner is left of {summary['candidates']} candidates ({summary['invalid']}"
            " invalid); loosen min_margin or combine, or look at the scores"
        )
    scratch = scratch_folder(round.root, "select", round.key, "redone from the start")
    for left in scratch.iterdir():  # by a killed run that may have made more shards
        left.unlink()
    try:
        write_winners(scratch, winners, files.candidates)
    except KeyError:
        raise UserError(
            f"{files.scores}: scores of other candidates than {files.candidates} holds; rerun score"
        ) from None
    summary |= {"winners": winners.height} | oddities
    summary |= {f"candidates_{name}": value for name, value in _means(scores, round.params.rewards).items()}
    summary |= {f"winners_{name}": value for name, value in _means(winners.lazy(), round.params.rewards).items()}
    generated = round.params.generate
    if generated.early_rejection:
        summary |= audit(parquet.scan(files.candidates, AUDITED_COLUMNS), scores.collect(), generated)
    write_json(scratch / "selection.json", summary)
    publish(scratch, files.winners)
    log.info(
        "select %s: %d winners of %d candidates for %d prompts",
        *(round.key, winners.height, summary["candidates"], summary["prompts"]),
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
    """Over the finite scores: JSON has no NaN."""
    found = scores.select(pl.col(name).filter(pl.col(name).is_finite()).mean() for name in names)
    return found.collect().row(0, named=True)


def _report_oddities(key: str, invalid: int, odd: dict[str, int], weights: Mapping[str, float]) -> None:
    parts = [f"{invalid} invalid candidates (flat images or latents that are not numbers)"] if invalid else []
    for name in weights:
        if count := odd[f"not_finite_{name}"]:
            parts.append(f"{name} is NaN or infinite for {count} candidates")
        if count := odd[f"constant_prompts_{name}"]:
            parts.append(f"{name} is constant for {count} prompts")
    if parts:
        log.warning("select %s: %s", key, "; ".join(parts))
