"""Stage `score`: score every candidate with every reward model.

A unit of work is a shard of candidates. Rewards whose scores are there already, of the same candidates and model, are
not computed again.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from srpo.data import parquet
from srpo.data.schemas import IDENTITY_FIELDS, SCORE_FIELDS, with_rewards
from srpo.data.scores import INVALID, invalid_path, read_source, score_path, write_scores
from srpo.rewards.batches import BATCH, computed_ahead, is_flat, score_batch, to_tensor
from srpo.rewards.loading import check_rewards, load_rewards, reward_code
from srpo.rewards.validated import ValidatedReward
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.inputs import reward_inputs
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Make, Units, unfinished
from srpo.storage.files import publish
from srpo.storage.hashing import file_digest, value_digest
from srpo.storage.json_files import read_json, write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
PLAN = "plan.json"
Row = Mapping[str, Any]


def score(round: Round) -> None:
    """Write `rounds/<key>/scores/`: one file per reward, one row per candidate, float32 in the reward's own units.

    `invalid` marks candidates that are not images: a single color (black is what a half-precision VAE makes of NaN), or
    NaN or infinity in their latents. They are scored all the same and never win. Candidates that were stopped early
    have no image and no scores, and are marked, too.

    Units that an interrupted run finished are kept. With `runtime.processes` above 1 this process starts workers.

    Raises:
        UserError: candidates are missing or damaged, or a reward can't be loaded, raises or returns no scores.
    """
    files = round.files
    files_of = {name: score_path(files.scores, name, spec.role) for name, spec in round.params.rewards.items()}
    files_of[INVALID] = invalid_path(files.scores)
    scratch, sources, missing = _plan_of_parent(round) or _plan(round, files_of)
    shards = {scratch / shard.name: shard for shard in parquet.shards(files.candidates)} if missing else {}
    units = Units(
        round,
        "score",
        list(shards),
        partial(_load, missing),
        [*reward_inputs(round, missing), round.base_files.rewards],
        lambda unit: [shards[unit]],
        partial(check_rewards, [name for name in missing if name != INVALID], round.root),
    )
    make_units(units)
    if distributed.is_worker():
        return
    assert not unfinished(units.paths)
    out = scratch / "scores"
    shutil.rmtree(out, ignore_errors=True)
    for name, path in files_of.items():
        target = out / path.relative_to(files.scores)
        if name in missing:
            write_scores(
                target, name, (table for unit in units.paths for table in parquet.read_batches(unit)), sources[name]
            )
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for part in sorted(out.iterdir()):
        publish(part, files.scores / part.name)
    shutil.rmtree(scratch)
    _report(round, missing)


@contextmanager
def _load(missing: Collection[str], round: Round) -> Iterator[Make]:
    """Load the rewards among the columns that are missing."""
    specs = {name: spec for name, spec in round.params.rewards.items() if name in missing}
    rewards = load_rewards(specs, round.params.runtime, round.root)
    name = f"score {round.key}"
    with tqdm(unit="img", desc=name, mininterval=2, disable=not distributed.draws_progress()) as progress:

        def make(unit: Path) -> None:
            shard = round.files.candidates / unit.name
            nonfinite = parquet.nonfinite_latents(shard) if INVALID in missing else set()
            rows = list(_score_shard(shard, rewards, nonfinite, progress))
            parquet.write_table(unit, rows, with_rewards(SCORE_FIELDS, rewards))

        yield make


def _plan(round: Round, files_of: Mapping[str, Path]) -> tuple[Path, dict[str, str], list[str]]:
    """Return the scratch folder, the hash of each column's inputs, and the columns that are missing."""
    sources = _sources(round)
    missing = [name for name, path in files_of.items() if read_source(path) != sources[name]]
    scratch = scratch_folder(round.root, "score", round.key, {name: sources[name] for name in missing})
    write_json(scratch / PLAN, {"sources": sources, "missing": missing})
    return scratch, sources, missing


def _plan_of_parent(round: Round) -> tuple[Path, dict[str, str], list[str]] | None:
    """Return in a worker the plan of the process that started it: candidates are hashed once, not by each process."""
    if distributed.PARENT_VARIABLE not in os.environ:
        return None
    (path,) = (round.root / ".srpo" / "scratch").glob(f"score@{round.key}-*/{PLAN}")
    plan = read_json(path)
    return path.parent, plan["sources"], plan["missing"]


def _sources(round: Round) -> dict[str, str]:
    """Return by reward, and for `invalid`, the hash of all that the column depends on."""
    shards = parquet.shards(round.files.candidates)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = list(pool.map(file_digest, shards))
    candidates = [[shard.name, value] for shard, value in zip(shards, digests, strict=True)]
    record = round.base_files.rewards
    pinned = read_json(record) if record.exists() else {}
    return {INVALID: value_digest(candidates)} | {
        name: value_digest([candidates, spec.kind, spec.model, pinned.get(name), reward_code(spec, round.root)])
        for name, spec in round.params.rewards.items()
    }


def _score_shard(
    shard: Path, rewards: Mapping[str, ValidatedReward], nonfinite: set[str], progress: tqdm
) -> Iterator[dict[str, Any]]:
    """Yield the scores of each candidate of a shard, in its order; BATCH images are scored at once."""
    finished = parquet.RowReader(shard).has("latents")
    texts = [row["prompt"] for row, done in zip(parquet.read_rows(shard, ["prompt"]), finished, strict=True) if done]
    for reward in rewards.values():
        reward.prepare(texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    rows = parquet.read_rows(shard, [*IDENTITY_FIELDS, "prompt", "image", "latents_shape"])
    for part, groups in computed_ahead(_decode, _parts(rows)):  # decoding goes on while the device scores
        yield from _score_rows(part, groups, rewards, nonfinite)
        progress.update(sum(len(group.rows) for group in groups))


class _Group(NamedTuple):
    """Candidates of one size. `images` are uint8 [n, 3, height, width], `flat` has whether each is a single color."""

    rows: list[Row]
    images: torch.Tensor
    flat: list[bool]


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield consecutive rows, BATCH of them with an image; the last ones may be fewer."""
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if sum(other["image"] is not None for other in part) == BATCH:
            yield part
            part = []
    yield part


def _decode(rows: list[Row]) -> tuple[list[Row], list[_Group]]:
    sizes: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row["image"] is not None:
            sizes.setdefault(tuple(row["latents_shape"]), []).append(row)
    groups = []
    for finished in sizes.values():
        images = to_tensor(row["image"] for row in finished)
        groups.append(_Group(finished, images, is_flat(images).tolist()))
    return rows, groups


def _score_rows(
    rows: list[Row], groups: list[_Group], rewards: Mapping[str, ValidatedReward], nonfinite: set[str]
) -> list[dict[str, Any]]:
    scored: dict[str, dict[str, Any]] = {}
    for group in groups:
        scores = score_batch(rewards, group.images, [row["prompt"] for row in group.rows])
        for i, row in enumerate(group.rows):
            values = {name: scores[name][i].item() for name in rewards}
            scored[row["candidate_id"]] = values | {INVALID: group.flat[i] or row["candidate_id"] in nonfinite}
    stopped = dict.fromkeys(rewards) | {INVALID: True}
    return [{name: row[name] for name in IDENTITY_FIELDS} | scored.get(row["candidate_id"], stopped) for row in rows]


def _report(round: Round, computed: list[str]) -> None:
    names = [name for name in computed if name != INVALID]
    invalid = parquet.table(invalid_path(round.files.scores), [INVALID])[INVALID]
    log.info(
        "score %s: %d candidates, %d of them invalid or stopped early; %s",
        *(round.key, len(invalid), invalid.sum()),
        f"scored with {', '.join(names)}" if names else "all scores are up to date",
    )
