"""Parquet datasets: schemas, the atomic writer, the readers.

Every file opens with `datasets.load_dataset("parquet", ...)` with its pictures decoded, because the HF
feature metadata is written into the Arrow schema; nothing here needs that library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from srpo.data.schemas import arrow_schema
from srpo.errors import UserError, one_line
from srpo.storage import footers

if TYPE_CHECKING:
    import polars as pl

# a row group is what is read at once: some twenty pictures of 1024 x 1024, thousands of small ones
ROW_GROUP_BYTES, ROW_GROUP = 32 << 20, range(16, 1 << 16)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write one parquet file, visible under its name only when it is whole, with checksums for all that is read.

    The same rows give the same bytes.
    """
    write_arrow(path, [pa.Table.from_pylist([dict(row) for row in rows], schema=arrow_schema(fields))])


def write_arrow(path: Path, tables: Iterable[pa.Table]) -> None:
    """The same from Arrow tables of one schema, written as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    tables = iter(tables)
    first = next(tables)
    rows = ROW_GROUP_BYTES * first.num_rows // max(1, first.nbytes)
    size = max(ROW_GROUP.start, min(rows, ROW_GROUP.stop))
    with pq.ParquetWriter(partial, first.schema, compression="zstd", write_page_checksum=True) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=size)
    footers.seal(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def shards(path: Path) -> list[Path]:
    """The parquet files of a dataset (a folder, or one file), in name order.

    Raises:
        UserError: there is none.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not found:
        raise UserError(f"{path}: no parquet file there; run the stage that makes it, or `dvc pull`/`dvc checkout`")
    return found


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """All rows of a dataset, row group by row group, so that memory stays flat.

    Raises:
        UserError: a file is damaged or lacks a column.
    """
    for shard in shards(path):
        for group in _row_groups(shard, columns):
            yield from group.to_pylist()


def latents_array(row: Mapping[str, Any], column: str = "latents") -> np.ndarray:
    """float16 [channels, height, width]: the sampler's final latents, already times the VAE's scaling factor."""
    return np.asarray(row[column], dtype=np.float16).reshape(row["latents_shape"])


def broken_latents(path: Path) -> set[str]:
    """The candidate_id of every candidate whose latents hold NaN or infinity.

    Raises:
        UserError: a file is damaged.
    """
    found: set[str] = set()
    for shard in shards(path):
        for group in _row_groups(shard, ["candidate_id", "latents"]):
            latents = group.column("latents").combine_chunks()
            finite = np.isfinite(latents.flatten().to_numpy())
            # a list column's offsets count from its own start once flattened
            bounds = np.cumsum(pc.list_value_length(latents).fill_null(0).to_numpy())  # given up early: has none
            whole = [part.all() for part in np.split(finite, bounds[:-1])]
            found |= {key for key, good in zip(group["candidate_id"].to_pylist(), whole, strict=True) if not good}
    return found


class Places:
    """A dataset's rows by their place, counted over all shards in name order. Opening it reads no rows."""

    def __init__(self, path: Path) -> None:
        """Read the footers of a dataset (a folder, or one file).

        Raises:
            UserError: a file is damaged, or there is none.
        """
        self.groups: list[tuple[Path, int]] = []
        counts = [0]
        for shard in shards(path):
            with _opened(shard, None) as file:
                self.groups += [(shard, group) for group in range(file.num_row_groups)]
                counts += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self.schema = file.schema_arrow
        self.starts = np.cumsum(counts)

    def take(self, places: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows at these ascending places, a row group's at a time; row groups without any are not read.

        Raises:
            UserError: a file is damaged or lacks a column.
        """
        ends = np.searchsorted(places, self.starts[1:])
        begin = 0
        wanted = np.flatnonzero(np.diff(ends, prepend=0))
        for shard, groups in groupby(wanted, lambda group: self.groups[group][0]):
            with _opened(shard, columns) as file:
                for group in groups:
                    table = file.read_row_group(self.groups[group][1], columns=columns)
                    yield table.take(places[begin : ends[group]] - self.starts[group])
                    begin = ends[group]


def scan(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    """These columns of a dataset as a polars query.

    All their pages are read once for their checksums, and not kept.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none.
    """
    import polars as pl

    found = shards(path)
    for shard in found:  # polars itself leaves the checksums alone, and a flipped bit may well decompress
        for _ in _row_groups(shard, columns):
            pass
    return pl.scan_parquet(found, extra_columns="ignore").select(columns)


def table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """These columns of a dataset that fits in memory.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none.
    """
    return scan(path, columns).collect()


def _row_groups(shard: Path, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    with _opened(shard, columns) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def find_candidates(path: Path, ids: pl.Series) -> pl.DataFrame:
    """Where the candidates of these ids are: `candidate_id` and `place`, as `Places` counts, in that order.

    An id that is not there has no row, one that is there twice has two.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none.
    """
    wanted = ids.unique().alias("candidate_id").to_frame().lazy()
    numbered = scan(path, ["candidate_id"]).with_row_index("place")
    return numbered.join(wanted, on="candidate_id", how="semi").collect(engine="streaming").sort("place")


@contextmanager
def _opened(shard: Path, columns: Sequence[str] | None) -> Iterator[pq.ParquetFile]:
    try:
        if not footers.is_sound(shard):
            raise UserError(f"{shard}: its footer is damaged; `dvc checkout` restores it")
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            if missing := set(columns or ()) - set(file.schema_arrow.names):
                raise UserError(f"{shard}: has no column {sorted(missing)[0]!r}; rerun what makes this file")
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = one_line(error)
        raise UserError(f"{shard}: not a readable parquet file ({reason:.120}); `dvc checkout` restores it") from None
