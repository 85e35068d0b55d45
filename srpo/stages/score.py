"""Stage `score`: every reward model on every candidate."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from srpo.data import parquet
from srpo.data.schemas import IDENTITY_FIELDS, SCORE_FIELDS, arrow_schema, with_rewards
from srpo.rewards.batches import BATCH, batched, is_flat, score_batch, to_tensor
from srpo.rewards.loading import load_pinned_rewards
from srpo.rewards.protocol import Reward
from srpo.rounds import Round
from srpo.storage.files import publish
from srpo.storage.scratch import scratch_folder

log = logging.getLogger("srpo")


def score(round: Round) -> None:
    """Write `rounds/<key>/scores.parquet`: one row a candidate, one float32 column a reward, raw units.

    The column `invalid` marks candidates that are no pictures: one flat colour (black is what a half precision
    VAE makes of NaN), or NaN or infinity in their latents. They are scored all the same and never win. Candidates that
    were given up early have no picture and no scores, and are marked, too.

    Raises:
        UserError: candidates are missing or damaged, or a reward can't be loaded, raises or answers nonsense.
    """
    files = round.files
    rewards = load_pinned_rewards(round.params, round.root)
    broken = parquet.nonfinite_latents(files.candidates)
    schema, counts = arrow_schema(with_rewards(SCORE_FIELDS, rewards)), Counter()

    def tables() -> Iterator[pa.Table]:
        with tqdm(unit="img", desc=f"score {round.key}", mininterval=2) as progress:
            rows = parquet.read_rows(files.candidates, [*IDENTITY_FIELDS, "prompt", "image"])
            for part in batched(_scored(rows, rewards, broken, progress.update), parquet.ROW_GROUP_ROWS):
                table = pa.Table.from_pylist(part, schema=schema)
                counts["all"] += table.num_rows
                counts["early"] += table.column(len(IDENTITY_FIELDS)).null_count
                counts["invalid"] += pc.sum(table["invalid"]).as_py()
                yield table

    unpublished = scratch_folder(round.root, "score", round.key) / files.scores.name
    parquet.write_arrow(unpublished, tables())
    publish(unpublished, files.scores)
    log.info(
        "score %s: %d candidates, %d given up early, %d invalid, rewards %s",
        round.key, counts["all"], counts["early"], counts["invalid"] - counts["early"], ", ".join(rewards),
    )  # fmt: skip


def _scored(
    rows: Iterable[Mapping[str, Any]], rewards: Mapping[str, Reward], broken: set[str], on_images: Callable[[int], Any]
) -> Iterator[dict[str, Any]]:
    """What scores.parquet says of each candidate, in their order; BATCH pictures are scored at once."""
    waiting: list[Mapping[str, Any]] = []
    finished = 0
    for row in rows:
        waiting.append(row)
        finished += row["image"] is not None
        if finished == BATCH:
            yield from _score_rows(waiting, rewards, broken)
            on_images(finished)
            waiting, finished = [], 0
    yield from _score_rows(waiting, rewards, broken)
    on_images(finished)


def _score_rows(
    rows: Sequence[Mapping[str, Any]], rewards: Mapping[str, Reward], broken: set[str]
) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if finished := [row for row in rows if row["image"] is not None]:
        images = to_tensor(row["image"] for row in finished)
        scores = score_batch(rewards, images, [row["prompt"] for row in finished])
        flat = is_flat(images).tolist()
        for i, row in enumerate(finished):
            values = {name: scores[name][i].item() for name in rewards}
            found[row["candidate_id"]] = values | {"invalid": flat[i] or row["candidate_id"] in broken}
    given_up = dict.fromkeys(rewards) | {"invalid": True}
    return [{name: row[name] for name in IDENTITY_FIELDS} | found.get(row["candidate_id"], given_up) for row in rows]
