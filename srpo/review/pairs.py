"""Blind pairs of held-out images: the same prompt and noise from two models, in random order on random sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from srpo.data import parquet
from srpo.errors import UserError
from srpo.review.candidates import fingerprint
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.hashing import derive_seed

COLUMNS = ["prompt_id", "prompt", "index"]


@dataclass(frozen=True)
class Pair:
    """One pair; `places` are those of its images in the two samples files, the round's first."""

    item: str
    prompt_id: str
    prompt: str
    index: int
    places: tuple[int, int]


def load_pairs(round: Round, against: str) -> list[Pair]:
    """Return the pairs that both models have samples of, in the order that every rater meets them.

    One order for all: raters who stop early have then judged the same pairs, which their agreement needs.

    Raises:
        UserError: no such round, no samples, or none in common.
    """
    if against == round.key or (against != BASE and against not in round.params.rounds):
        others = ", ".join(key for key in (BASE, *round.params.rounds) if key != round.key)
        raise UserError(f"--against {against}: name another round or base: {others}")
    tables = [parquet.table(samples_file(round, key), COLUMNS).with_row_index("place") for key in (round.key, against)]
    both = tables[0].join(tables[1].drop("prompt"), on=["prompt_id", "index"], suffix="_other", maintain_order="left")
    if both.is_empty():
        raise UserError(f"rounds/{round.key} and rounds/{against}: no samples of the same prompts; evaluate both anew")
    pairs = [
        Pair(f"{against}/{row['prompt_id']}/{row['index']}", row["prompt_id"], row["prompt"], row["index"],
             (row["place"], row["place_other"]))
        for row in both.iter_rows(named=True)
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: derive_seed("order", round.key, pair.item))


def on_the_left(pair: Pair, key: str, rater: str) -> int:
    """Return whose image this rater sees on the left: 0 the round's, 1 the other's."""
    return derive_seed("side", key, rater, pair.item) & 1


def votes_dataset(round: Round, against: str) -> str:
    """Return the fingerprint of the samples that votes are about.

    Raises:
        UserError: a model has no samples.
    """
    return fingerprint([samples_file(round, key) for key in (round.key, against)])


def samples_file(round: Round, key: str) -> Path:
    """Return the samples of a round, or of base."""
    return RoundFiles(round.root, key).evaluation / "samples.parquet"
