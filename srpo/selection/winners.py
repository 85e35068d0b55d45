"""The dataset of winners: their candidates' rows and what selection found. Memory does not grow with the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from srpo.data import parquet
from srpo.data.parquet import Places
from srpo.data.schemas import LATENTS, arrow_schema

SHARD_BYTES = 256 << 20  # before compression


def write_winners(folder: Path, winners: pl.DataFrame, candidates: Path) -> None:
    """Write shards of `winners` (from `choose_winners`), in the candidates' order.

    A row has the candidate's columns, the rewards, selection_score, margin, weight, loser_id and `loser_latents`: the
    latents of the prompt's worst candidate, null if that is the winner itself or has none.

    Raises:
        KeyError: `candidates` does not hold every winner and loser exactly once.
        UserError: a shard of `candidates` is damaged.
    """
    own = Places(candidates)
    found = _placed(winners, candidates)
    rewards = [name for name in winners.columns if name not in (*own.schema.names, *MADE)]
    fields = {field.name: field.type for field in own.schema} | dict.fromkeys(rewards, pa.float32()) | MADE
    schema = arrow_schema(fields)
    for number, shard in enumerate(_full(_rows(own, found, schema))):
        parquet.write_arrow(folder / f"shard-{number:05d}.parquet", [shard])


MADE = dict.fromkeys(("selection_score", "margin", "weight"), pa.float32())
MADE |= {"loser_id": pa.string(), "loser_latents": LATENTS}


def _placed(winners: pl.DataFrame, candidates: Path) -> pl.DataFrame:
    """`winners` in the candidates' order, with `_place` and `_loser_place` (null for a winner's own)."""
    wanted = pl.concat([winners["candidate_id"], winners["loser_id"].alias("candidate_id")])
    places = parquet.find_candidates(candidates, wanted).rename({"place": "_place"})
    if places.height != wanted.n_unique() or places["candidate_id"].n_unique() != places.height:
        raise KeyError(candidates)
    losers = places.select(loser_id="candidate_id", _loser_place="_place")
    own = pl.when(pl.col("_loser_place") != pl.col("_place")).then("_loser_place").alias("_loser_place")
    return winners.join(places, on="candidate_id").join(losers, on="loser_id").with_columns(own).sort("_place")


def _rows(candidates: Places, winners: pl.DataFrame, schema: pa.Schema) -> Iterator[pa.Table]:
    done = 0
    for table in candidates.take(winners["_place"].to_numpy()):
        part = winners.slice(done, table.num_rows)
        done += table.num_rows
        latents = _latents(candidates, part["_loser_place"])
        columns = [
            latents if name == "loser_latents" else table[name] if name in table.column_names else part[name].to_arrow()
            for name in schema.names
        ]
        yield pa.table([column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


def _latents(candidates: Places, places: pl.Series) -> pa.ChunkedArray:
    """The latents at these places, in their order; null where a place is."""
    sought = places.drop_nulls().unique().sort()
    parts = [table["latents"] for table in candidates.take(sought.to_numpy(), ["latents"])]
    found = pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=LATENTS)
    return found.take(sought.search_sorted(places).set(places.is_null(), None).to_arrow())


def _full(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.nbytes for one in waiting) >= SHARD_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
