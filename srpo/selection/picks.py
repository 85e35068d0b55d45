"""Picks of people: one choice a prompt, in a file whose name holds its hash, and the winners that follow from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from srpo.config.schema import SelectParams
from srpo.data import parquet
from srpo.errors import UserError
from srpo.selection.best_of_n import PROMPT, selection_score
from srpo.storage.named_by_hash import read_rows, write_rows

STEM = "picks"
TIE = 1e-12  # between a score and the mean of equal scores


@dataclass(frozen=True)
class Pick:
    """What people chose for a prompt; `picked` and the sha256 of its image are None where all candidates are bad."""

    prompt_id: str
    picked: str | None
    image: str | None
    raters: list[str]


def write_picks(folder: Path, picks: list[Pick]) -> Path:
    """Write picks in the order of their prompts and return the file's path, `picks-<hash>.jsonl`."""
    return write_rows(folder, STEM, map(asdict, sorted(picks, key=lambda pick: pick.prompt_id)))


def read_picks(path: Path, key: str) -> dict[str, Pick]:
    """Read the picks of round `key`, by prompt.

    Raises:
        UserError: no such file, or not the content that its name says.
    """
    rows = read_rows(path, STEM, f"rounds.{key}.select.picks", f"srpo picks {key}")
    return {row["prompt_id"]: Pick(**row) for row in rows}


def check_images(picks: Mapping[str, Pick], candidates: Path) -> None:
    """Check that the images picked are those of the candidates.

    Raises:
        UserError: a candidate is missing or has another image, as after another `generate`.
    """
    sought = {pick.picked: pick for pick in picks.values() if pick.picked}
    places = parquet.find_candidates(candidates, pl.Series(list(sought), dtype=pl.String))
    for table in parquet.RowReader(candidates).take(places["row"].to_numpy(), ["candidate_id", "image"]):
        for row in table.to_pylist():
            pick = sought[row["candidate_id"]]
            if row["image"] and hashlib.sha256(row["image"]["bytes"]).hexdigest() == pick.image:
                del sought[row["candidate_id"]]
    if sought:
        raise UserError(
            f"select.picks: {len(sought)} picks, such as {next(iter(sought))}, are of other images than"
            f" {candidates} holds; pick again, or remove select.picks"
        )


def picked_winners(
    scores: pl.LazyFrame, weights: Mapping[str, float], settings: SelectParams, picks: Mapping[str, Pick]
) -> pl.DataFrame:
    """Return the rows of the candidates that people picked, as `choose_winners` returns its winners.

    Margins may be negative, they are null where the rewards can't tell, and no limit of `settings` applies. The loser
    is the worst of the other candidates by the selection score; the weight is 1, the mean of all weights.

    Args:
        scores: of the valid candidates; columns prompt_id, candidate_id, index and the rewards.
        weights: by name of the selecting rewards.
    """
    chosen = [pick.picked for pick in picks.values() if pick.picked]
    rows = scores.filter(pl.col("prompt_id").is_in(list(picks))).collect().sort("prompt_id", "index")
    rows = rows.with_columns(pl.col("candidate_id").is_in(chosen).alias("_chosen"), pl.col("prompt_id").alias(PROMPT))
    usable = rows.filter(pl.all_horizontal(pl.col(list(weights)).is_finite()))
    usable = usable.with_columns(selection_score(weights, settings.combine).alias("selection_score"))
    score = pl.col("selection_score")
    worst = usable.filter(~pl.col("_chosen")).group_by("prompt_id").agg(pl.col("candidate_id").get(score.arg_min()))
    winners = (
        rows.filter("_chosen")
        .join(usable.select("candidate_id", "selection_score"), on="candidate_id", how="left")
        .join(usable.group_by("prompt_id").agg(score.mean().alias("_mean")), on="prompt_id", how="left")
        .join(worst.rename({"candidate_id": "loser_id"}), on="prompt_id", how="left")
    )
    return winners.with_columns(
        margin=pl.when((score - pl.col("_mean")).abs() > TIE).then(score - pl.col("_mean")),
        loser_id=pl.coalesce("loser_id", "candidate_id"),
        weight=pl.lit(1.0),
    ).drop("_chosen", "_mean", PROMPT)
