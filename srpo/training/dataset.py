"""The training set: this round's winners and, for replay or a start from base, those of its ancestors.

Latents stay on disk and are read for each batch, so memory does not grow with their size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from srpo.config.schema import TrainParams
from srpo.data import parquet
from srpo.data.parquet import RowReader
from srpo.errors import UserError
from srpo.lineage.record import winners_of_ancestors
from srpo.rounds import Round, RoundFiles
from srpo.storage.hashing import derive_seed, digest

log = logging.getLogger(__name__)

# a margin is 0 if all candidates of the prompt have the same score, except for the rounding of a mean; that of a pick
# may be negative, or null where the rewards can't tell, and still its loser lost
TIE = 1e-12


@dataclass(frozen=True)
class _RoundWinners:
    """Winners of one round.

    Attributes:
        rows: int64 [n], the winners' rows in the dataset that `reader` reads.
        prompts: one per winner.
        weights: float32 [n], mean 1.
    """

    reader: RowReader
    rows: np.ndarray
    prompts: pl.Series
    weights: torch.Tensor


@dataclass(frozen=True)
class Winners:
    """Winners of one or more rounds; the first `num_current` are this round's, the rest its ancestors'.

    Attributes:
        prompts: the distinct ones, sorted.
        prompt_indices: int64 [n], for each winner the position of its prompt in `prompts`.
        weights: float32 [n], mean 1 in every round.
        shapes: of the winners' latents, int32 [n, 3]: channels, height, width.
    """

    prompts: list[str]
    prompt_indices: torch.Tensor
    weights: torch.Tensor
    shapes: np.ndarray
    _rounds: list[_RoundWinners]

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def num_current(self) -> int:
        """Return the number of this round's winners."""
        return len(self._rounds[0].rows)

    def latents(self, indices: torch.Tensor, column: str = "latents") -> torch.Tensor:
        """Read the latents of these winners, which have one size, or in the column `loser_latents` their losers'.

        Returns:
            float16 [len(indices), channels, height, width].

        Raises:
            UserError: a file is damaged.
        """
        latents = torch.empty((len(indices), *self.shapes[int(indices[0])].tolist()), dtype=torch.float16)
        start = 0
        for winners in self._rounds:
            stop = start + len(winners.rows)
            positions = ((indices >= start) & (indices < stop)).nonzero().flatten()
            if len(positions):
                rows = winners.rows[(indices[positions] - start).numpy()]
                latents[positions] = torch.from_numpy(winners.reader.latents(rows, column))
            start = stop
        return latents

    def latents_of_any_size(self, indices: torch.Tensor, column: str = "latents") -> list[torch.Tensor]:
        """Read what `latents` reads, for winners of several sizes: float16 [channels, height, width] each."""
        found: dict[int, torch.Tensor] = {}
        for positions in self.positions_by_shape(indices):
            found |= zip(positions, self.latents(indices[positions], column), strict=True)
        return [found[position] for position in range(len(indices))]

    def positions_by_shape(self, indices: torch.Tensor) -> list[list[int]]:
        """Return the positions in `indices`, grouped by the shape of the winners' latents."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, index in enumerate(indices.tolist()):
            groups.setdefault(tuple(self.shapes[index].tolist()), []).append(position)
        return list(groups.values())


def winners_digests(round: Round) -> dict[str, str]:
    """Return by round the sha256 of the winners that the settings use: this round's, then those of its ancestors.

    Raises:
        UserError: ancestors' winners are missing, or differ from those that the parent's lineage names.
    """
    return {round.key: digest(round.files.winners)} | _checked_ancestors(round)


def load_winners(round: Round, keys: Iterable[str], *, pairs: bool) -> Winners:
    """Load the training set; latents are read as they are needed.

    Args:
        keys: the rounds that `winners_digests` names.
        pairs: only winners that beat a loser, in preference objectives.

    Raises:
        UserError: winners are missing or damaged, or have no losers.
    """
    rounds = [_read_round(RoundFiles(round.root, key).winners, pairs) for key in keys]
    prompts = pl.concat([winners.prompts for winners in rounds])
    distinct = prompts.unique().sort()
    return Winners(
        prompts=distinct.to_list(),
        prompt_indices=torch.from_numpy(distinct.search_sorted(prompts).cast(pl.Int64).to_numpy(writable=True)),
        weights=torch.cat([winners.weights for winners in rounds]),
        shapes=np.concatenate([winners.reader.shapes[winners.rows] for winners in rounds]),
        _rounds=rounds,
    )


def batch_indices(winners: Winners, settings: TrainParams, seed: tuple[int, str]) -> Iterator[torch.Tensor]:
    """Yield indices of winners for one step after another, int64 [batch_size], without end.

    Every epoch is a new permutation. With `replay` that share of the indices is of ancestors' winners (if that is no
    whole number, batches differ by one so that the sum is right); without, all winners are drawn alike.
    """
    total = len(winners)
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
        for i in torch.randperm(len(indices), generator=generator):
            yield indices[int(i)]
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


def _read_round(path: Path, pairs: bool) -> _RoundWinners:
    table = parquet.table(path, ["prompt", "weight", *(["margin"] if pairs else [])])
    if table.is_empty():
        raise UserError(f"{path}: holds no winners; run select")
    reader = RowReader(path)
    rows = np.arange(len(table))
    if pairs:
        rows = _rows_of_pairs(path, reader, table["margin"])
    weights = torch.from_numpy(table["weight"].to_numpy()[rows])
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise UserError(f"{path}: a weight is negative or not finite, or all are zero; rerun select")
    return _RoundWinners(
        reader=reader,
        rows=rows,
        prompts=table["prompt"].gather(rows),
        weights=weights / weights.mean(),
    )


def _rows_of_pairs(path: Path, reader: RowReader, margins: pl.Series) -> np.ndarray:
    """Return the rows of winners that beat their loser."""
    if "loser_latents" not in reader.schema.names:
        raise UserError(f"{path}: winners lack loser_latents; rerun select")
    has_loser = reader.has("loser_latents")
    is_tie = has_loser & (margins.abs() <= TIE).fill_null(False).to_numpy()
    rows = np.flatnonzero(has_loser & ~is_tie)
    if len(rows) == 0:
        raise UserError(f"{path}: no winner has a loser with a lower score; train.objective sft needs none")
    if len(rows) < len(margins):
        log.warning(
            "%s: left out %d winners without a loser and %d whose prompt's candidates all have the same score",
            *(path, len(margins) - has_loser.sum(), is_tie.sum()),
        )
    return rows
