"""The candidates of a round as the review page shows them: a table without images, and images one at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from srpo.data import parquet
from srpo.data.prompts import load_prompts
from srpo.data.scores import read_scores
from srpo.errors import MissingFile, UserError
from srpo.rounds import Round
from srpo.storage.hashing import value_digest


class Images:
    """The images of a parquet dataset by their place, as they are stored."""

    def __init__(self, path: Path) -> None:
        """Read the footers.

        Raises:
            UserError: a file is damaged, or there is none.
        """
        self._rows = parquet.RowReader(path)
        self._lock = threading.Lock()

    def bytes_at(self, place: int) -> bytes | None:
        """Return an encoded image, or None for a candidate that has none.

        Raises:
            IndexError: there is no such place.
            UserError: the file is damaged.
        """
        if not 0 <= place < self._rows.num_rows:
            raise IndexError(place)
        with self._lock:  # requests come from several threads
            table = next(self._rows.take(np.array([place]), ["image"]))
        cell = table["image"][0].as_py()
        return cell["bytes"] if cell else None


def load_candidates(round: Round) -> pl.DataFrame:
    """Return one row a candidate, in the order of the dataset.

    Columns: place (of its image), candidate_id, prompt_id, prompt, index, finished (has an image), the rewards (absent
    before the stage score), invalid, winner, disagreement (0 to 1: the widest difference between two rewards' ranks of
    the candidate within its prompt) and tags (`name=value` texts).

    Raises:
        UserError: there are no candidates, or a file is damaged.
    """
    files = round.files
    columns = ["candidate_id", "prompt_id", "prompt", "index", "steps", "stopped_at"]
    table = parquet.table(files.candidates, columns).with_row_index("place")
    finished = pl.col("stopped_at").is_null() | (pl.col("stopped_at") >= pl.col("steps"))
    table = table.with_columns(finished=finished).drop("steps", "stopped_at")
    rewards = list(round.params.rewards)
    if files.scores.exists():
        roles = {name: spec.role for name, spec in round.params.rewards.items()}
        scores = read_scores(files.scores, roles).drop("prompt_id", "index")
        table = table.join(scores, on="candidate_id", how="left", maintain_order="left")
    else:
        table, rewards = table.with_columns(invalid=pl.lit(False)), []
    winners: list[str] = []
    if files.winners.exists():
        winners = parquet.table(files.winners, ["candidate_id"])["candidate_id"].to_list()
    tags = _tags(round)
    return table.with_columns(
        pl.col("invalid").fill_null(False),
        winner=pl.col("candidate_id").is_in(winners),
        disagreement=_disagreement(rewards),
        tags=pl.col("prompt_id").replace_strict(tags, default=[], return_dtype=pl.List(pl.String)),
    )


def fingerprint(paths: Sequence[Path]) -> str:
    """Return what tells datasets apart without reading their images: a hash of the footers, which hold every size."""
    footers = [str(pq.read_metadata(shard).to_dict()) for path in paths for shard in parquet.shards(path)]
    return value_digest(footers)[:16]


def picks_dataset(round: Round) -> str:
    """Return the fingerprint of the candidates that picks are about."""
    return fingerprint([round.files.candidates])


def to_pick(candidates: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the candidates that can be picked, by prompt: finished and valid, of prompts that have at least two."""
    sound = candidates.filter("finished", ~pl.col("invalid"))
    groups = sound.partition_by("prompt_id", maintain_order=True, as_dict=True)
    return {str(key[0]): group for key, group in groups.items() if group.height > 1}


def _disagreement(rewards: list[str]) -> pl.Expr:
    if len(rewards) < 2:
        return pl.lit(0.0)
    count = pl.len().over("prompt_id")
    ranks = [(pl.col(name).rank("average").over("prompt_id") - 1) / (count - 1) for name in rewards]
    return pl.max_horizontal(ranks) - pl.min_horizontal(ranks)


def _tags(round: Round) -> dict[str, list[str]]:
    try:
        prompts = load_prompts(round.root / round.params.prompts.train)
    except (MissingFile, UserError):  # the prompt file may have changed since
        return {}
    return {prompt.id: [f"{name}={value}" for name, value in prompt.tags.items()] for prompt in prompts}
