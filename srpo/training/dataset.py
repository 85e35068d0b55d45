"""The training set: this round's winners and, for replay or a start from base, those of its ancestors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from srpo.config.schema import TrainParams
from srpo.data import parquet
from srpo.errors import UserError
from srpo.lineage.record import winners_of_ancestors
from srpo.rounds import Round, RoundFiles
from srpo.storage.hashing import derive_seed, digest

log = logging.getLogger(__name__)

COLUMNS = ["prompt", "latents", "latents_shape", "weight"]


@dataclass(frozen=True)
class Winners:
    """Winners of one or more rounds; the first `num_current` are this round's, the rest its ancestors'.

    Attributes:
        latents: float16 [n, channels, h, w].
        losers: the same shape, the losers' latents; None when the loss needs none.
        weights: float32 [n], mean 1 in every round.
        digests: by round, the sha256 of the winners folder the rows came from.
    """

    prompts: list[str]
    latents: torch.Tensor
    losers: torch.Tensor | None
    weights: torch.Tensor
    num_current: int
    digests: dict[str, str]


def load_winners(round: Round, *, pairs: bool) -> Winners:
    """Load the winners that the round's `train.start` and `train.replay` ask for.

    Args:
        pairs: load losers, too; winners that have none (the only usable candidate of their prompt) are left out.

    Raises:
        UserError: winners are missing, have no losers, have several sizes, or differ from those that the parent's
            lineage names.
    """
    digests = {round.key: digest(round.files.winners)} | _checked_ancestors(round)
    rounds = [_read_round(RoundFiles(round.root, name).winners, pairs) for name in digests]
    shapes = {winners.latents.shape[1:] for winners in rounds}
    if len(shapes) > 1:
        sizes = ", ".join(sorted("x".join(str(side) for side in shape) for shape in shapes))
        raise UserError(
            f"rounds.{round.key}.train: winners of {', '.join(digests)} have latents of several sizes ({sizes});"
            " start from the parent without replay"
        )
    return Winners(
        prompts=[prompt for winners in rounds for prompt in winners.prompts],
        latents=torch.cat([winners.latents for winners in rounds]),
        losers=torch.cat([winners.losers for winners in rounds]) if pairs else None,
        weights=torch.cat([winners.weights for winners in rounds]),
        num_current=rounds[0].num_current,
        digests=digests,
    )


def batch_indices(winners: Winners, settings: TrainParams, seed: tuple[int, str]) -> Iterator[torch.Tensor]:
    """Yield indices of winners for one step after another, int64 [batch_size], without end.

    Every epoch is a new permutation. With `replay` that share of the indices is of ancestors' winners (if that is no
    whole number, batches differ by one so that the sum is right); without, all winners are drawn alike.
    """
    total = len(winners.latents)
    share = settings.replay if winners.num_current < total else 0.0
    current = _shuffled(range(winners.num_current if share else total), seed, "epoch")
    earlier = _shuffled(range(winners.num_current, total), seed, "replay")
    step = 0
    while True:
        step += 1
        replayed = int(step * share * settings.batch_size) - int((step - 1) * share * settings.batch_size)
        indices = [next(current) for _ in range(settings.batch_size - replayed)]
        indices += [next(earlier) for _ in range(replayed)]
        yield torch.tensor(indices)


def _shuffled(indices: range, seed: tuple[int, str], name: str) -> Iterator[int]:
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(derive_seed(*seed, name, epoch))
        yield from (indices[i] for i in torch.randperm(len(indices), generator=generator).tolist())
        epoch += 1


def _checked_ancestors(round: Round) -> dict[str, str]:
    """Return the digests of the ancestors' winners, if the settings use them, after comparing them with the files.

    The parent's lineage names them.
    """
    settings = round.params.train
    path = round.ancestors
    if not path or (settings.start == "parent" and not settings.replay):
        return {}
    parent = path[-1]
    known = winners_of_ancestors(round.root, parent)
    for name in path:
        folder = RoundFiles(round.root, name).winners
        if name not in known:
            raise UserError(
                f"{round.parent_files.adapter / 'lineage.json'}: does not name the winners of {name};"
                f" rerun train of round {parent}"
            )
        if not folder.is_dir():
            raise UserError(f"{folder}: missing; `dvc pull select@{name}`")
        if digest(folder) != known[name]:
            raise UserError(
                f"{folder}: not the winners that the adapter of round {parent} was trained on;"
                f" `dvc checkout select@{name}`, or rerun round {name}"
            )
    return {name: known[name] for name in path}


def _read_round(path: Path, pairs: bool) -> Winners:
    rows = list(parquet.read_rows(path, COLUMNS))
    if pairs:
        if "loser_latents" not in pq.read_schema(parquet.shards(path)[0]).names:
            raise UserError(f"{path}: winners lack loser_latents; rerun select")
        losers = parquet.read_rows(path, ["loser_latents"])
        rows = [row | loser for row, loser in zip(rows, losers, strict=True)]
    if not rows:
        raise UserError(f"{path}: holds no winners; run select")
    if pairs:
        alone = sum(row["loser_latents"] is None for row in rows)
        rows = [row for row in rows if row["loser_latents"] is not None]
        if not rows:
            raise UserError(f"{path}: no winner has a loser; train.objective sft needs none")
        if alone:
            log.warning("%s: left out %d winners without a loser", path, alone)
    weights = torch.tensor([row["weight"] for row in rows])
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise UserError(f"{path}: a weight is negative or not finite, or all are zero; rerun select")
    return Winners(
        prompts=[row["prompt"] for row in rows],
        latents=_stack([parquet.latents_array(row) for row in rows], path),
        losers=_stack([parquet.latents_array(row, "loser_latents") for row in rows], path) if pairs else None,
        weights=weights / weights.mean(),
        num_current=len(rows),
        digests={},
    )


def _stack(arrays: list[np.ndarray], path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.stack(arrays))
    except ValueError:
        raise UserError(f"{path}: latents have several sizes; rerun generate and select of this round") from None
