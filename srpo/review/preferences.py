"""What people preferred in rounds: for each decision the image chosen and those it was chosen over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from srpo.data import parquet
from srpo.errors import MissingFile
from srpo.review.candidates import picks_dataset
from srpo.review.journal import Journal
from srpo.review.pairs import load_pairs, samples_file
from srpo.review.votes import current_votes
from srpo.rounds import Round

ImageKey = tuple[Path, int]
"""A dataset's path and the image's place in it."""


@dataclass(frozen=True)
class Preference:
    """One decision: the image preferred, and the others that were shown."""

    prompt: str
    chosen: ImageKey
    others: tuple[ImageKey, ...]


def preferences(rounds: Sequence[Round]) -> Iterator[Preference]:
    """Yield what stands of all raters' picks and votes about the images that the rounds hold now.

    Prompts whose candidates are all bad, and equal votes, prefer nothing and are left out.

    Raises:
        UserError: a journal or a dataset is damaged.
    """
    for round in rounds:
        yield from _picks(round)
        yield from _votes(round)


def _picks(round: Round) -> Iterator[Preference]:
    decisions = Journal(round.root, round.key, "picks").decisions()
    if not decisions or not list(round.files.candidates.glob("*.parquet")):
        return
    dataset, path = picks_dataset(round), round.files.candidates
    ids = parquet.table(round.files.candidates, ["candidate_id"])["candidate_id"].to_list()
    places = {name: place for place, name in enumerate(ids)}
    for row in decisions:
        shown = [one["candidate_id"] for one in row["shown"]]
        if row["dataset"] == dataset and row["picked"] is not None and len(shown) > 1:
            others = tuple((path, places[name]) for name in shown if name != row["picked"])
            yield Preference(row["prompt"], (path, places[row["picked"]]), others)


def _votes(round: Round) -> Iterator[Preference]:
    decisions = Journal(round.root, round.key, "votes").decisions()
    for against in dict.fromkeys(row["against"] for row in decisions):
        try:
            votes = current_votes(round, against, decisions)
            pairs = {(pair.prompt_id, pair.index): pair for pair in load_pairs(round, against)}
        except MissingFile:  # not evaluated here
            continue
        files = [samples_file(round, key) for key in (round.key, against)]
        for row in votes:
            if row["value"] != 0.5:
                images = list(zip(files, pairs[row["prompt_id"], row["index"]].places, strict=True))
                chosen, other = images if row["value"] == 1 else images[::-1]
                yield Preference(row["prompt"], chosen, (other,))
