"""The dataset of winners: their candidates' rows and the results of selection. Images are copied, never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import polars as pl
import pyarrow as pa

from srpo.data import parquet
from srpo.data.parquet import RowReader
from srpo.data.schemas import LATENTS, WINNER_FIELDS, arrow_schema

SHARD_BYTES = 256 << 20  # before compression


def write_winners(folder: Path, winners: pl.DataFrame, candidates: Path) -> None:
    """Write shards of `winners` (from `choose_winners`), in the candidates' order.

    A row has the candidate's columns, the rewards, selection_score, margin, weight, loser_id and `loser_latents`: the
    latents of the prompt's worst candidate, null if that is the winner itself or has none.

    Raises:
        KeyError: `candidates` does not hold every winner and loser exactly once.
        UserError: a shard of `candidates` is damaged.
    """
    reader = RowReader(candidates)
    located = _located(winners, candidates)
    rewards = [name for name in winners.columns if name not in (*reader.schema.names, *WINNER_FIELDS)]
    fields = {field.name: field.type for field in reader.schema} | dict.fromkeys(rewards, pa.float32()) | WINNER_FIELDS
    tables = _rows(reader, located, arrow_schema(fields))
    for number, first in enumerate(tables):
        parquet.write_arrow(folder / f"shard-{number:05d}.parquet", _one_shard(first, tables))


def _located(winners: pl.DataFrame, candidates: Path) -> pl.DataFrame:
    """Return `winners` in the candidates' order, with `_row` and `_loser_row` (null if the winner is the loser)."""
    ids = pl.concat([winners["candidate_id"], winners["loser_id"].alias("candidate_id")])
    rows = parquet.find_candidates(candidates, ids).rename({"row": "_row"})
    if rows.height != ids.n_unique() or rows["candidate_id"].n_unique() != rows.height:
        raise KeyError(candidates)
    losers = rows.select(loser_id="candidate_id", _loser_row="_row")
    loser_row = pl.when(pl.col("_loser_row") != pl.col("_row")).then("_loser_row").alias("_loser_row")
    return winners.join(rows, on="candidate_id").join(losers, on="loser_id").with_columns(loser_row).sort("_row")


def _rows(candidates: RowReader, winners: pl.DataFrame, schema: pa.Schema) -> Iterator[pa.Table]:
    done = 0
    for table in candidates.take(winners["_row"].to_numpy()):
        part = winners.slice(done, table.num_rows)
        done += table.num_rows
        latents = _latents(candidates, part["_loser_row"])
        columns = [
            latents if name == "loser_latents" else table[name] if name in table.column_names else part[name].to_arrow()
            for name in schema.names
        ]
        yield pa.table([column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


def _latents(candidates: RowReader, rows: pl.Series) -> pa.ChunkedArray:
    """Return the latents cells of these rows, in their order; null where `rows` is null."""
    ascending = rows.drop_nulls().unique().sort()
    parts = [table["latents"] for table in candidates.take(ascending.to_numpy(), ["latents"])]
    cells = pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=LATENTS)
    return cells.take(ascending.search_sorted(rows).set(rows.is_null(), None).to_arrow())


def _one_shard(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield tables until they have SHARD_BYTES; the rest stays in `others`."""
    size = 0
    for table in chain([first], others):
        yield table
        size += table.nbytes
        if size >= SHARD_BYTES:
            return
