"""Parquet datasets: the atomic writer, and readers that verify checksums.

Every file opens with `datasets.load_dataset("parquet", ...)` with its images decoded, because the Arrow schema holds
that library's feature metadata; nothing in this package needs the library.

Files are plain parquet with a CRC32 per page, which is verified each time a page is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srpo.data.schemas import IMAGE, LATENTS, TYPES, arrow_schema
from srpo.errors import UserError, one_line
from srpo.storage.files import atomic_write

if TYPE_CHECKING:
    import polars as pl

# the least that is read to get one row: two images of 1024 x 1024 and their latents, or thousands of small rows
ROW_GROUP_BYTES = 4 << 20
ROW_GROUP_ROWS = 1 << 16
OPEN_SHARDS = 128  # that a RowReader keeps open: at true size a footer takes 2 MB, and 5 ms to read
BATCH_BYTES = 8 << 20  # of rows in memory while a file is read from start to end; more is slower
_LARGE = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}  # as polars writes them


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], fields: Mapping[str, pa.DataType]) -> None:
    """Write one parquet file atomically. The same rows give the same bytes."""
    write_arrow(path, [pa.Table.from_pylist([dict(row) for row in rows], schema=arrow_schema(fields))])


def write_arrow(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write one parquet file atomically from Arrow tables of one schema, without holding all of them in memory.

    Images and latents are neither compressed nor dictionary-encoded: nothing is gained from it.
    """
    tables = iter(tables)
    first = next(tables)
    leaves = [_leaf(field) for field in first.schema if field.type not in (IMAGE, LATENTS)]
    latents = [field.name for field in first.schema if field.type == LATENTS]
    with (
        atomic_write(path) as partial,
        pq.ParquetWriter(
            partial,
            first.schema,
            compression=dict.fromkeys(leaves, "zstd"),
            use_dictionary=leaves,
            write_statistics=leaves + latents,  # those of images would take longer than the rest
            write_page_checksum=True,
        ) as writer,
    ):
        for group in _row_groups(first, tables):
            writer.write_table(group, row_group_size=group.num_rows)


def shards(path: Path) -> list[Path]:
    """Return the parquet files of a dataset (a folder, or one file), in name order.

    Raises:
        UserError: there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise UserError(f"{path}: no parquet file there; run the stage that makes it, or `dvc pull`/`dvc checkout`")
    return files


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield all rows of a dataset as tables of about 8 MiB, so that memory use stays flat.

    Raises:
        UserError: a file is damaged or lacks a column.
    """
    for shard in shards(path):
        with _opened(shard, columns) as file:
            names = file.schema_arrow.names if columns is None else list(columns)
            rows = 0
            for batch in file.iter_batches(_batch_rows(file, names), columns=names):
                rows += batch.num_rows
                yield pa.Table.from_batches([batch]).select(names)
            if rows != file.metadata.num_rows:  # a damaged page header can end the reading without an error
                raise pa.ArrowInvalid(f"{rows} of {file.metadata.num_rows} rows")


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield all rows of a dataset as dicts, with flat memory use.

    Raises:
        UserError: a file is damaged or lacks a column.
    """
    for table in read_batches(path, columns):
        yield from table.to_pylist()


def scan(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    """Return these columns of a dataset as a polars query, which reads only the columns that it needs, in batches.

    Polars' own reader ignores page checksums, so pages are read with pyarrow.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none; also when the query is collected.
    """
    import polars as pl
    from polars.io.plugins import register_io_source

    with _opened(shards(path)[0], columns) as file:
        fields = [file.schema_arrow.field(name) for name in columns]
    empty = pl.DataFrame(pa.schema(fields).empty_table())

    def read(
        wanted: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        left = n_rows
        for table in read_batches(path, columns if wanted is None else wanted):
            frame = pl.DataFrame(table).head(table.num_rows if left is None else left)
            if left is not None:
                left -= frame.height
            yield frame if predicate is None else frame.filter(predicate)
            if left == 0:
                return

    return register_io_source(read, schema=empty.schema, is_pure=True)


def table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Return these columns of a dataset that fits in memory.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none.
    """
    return scan(path, columns).collect()


def find_candidates(path: Path, ids: pl.Series) -> pl.DataFrame:
    """Return `candidate_id` and `row`, as `RowReader` counts rows, of the candidates with these ids, in row order.

    An id that the dataset lacks has no row; an id that it holds twice has two.

    Raises:
        UserError: a file is damaged, lacks a column, or there is none.
    """
    wanted = ids.unique().alias("candidate_id").to_frame().lazy()
    numbered = scan(path, ["candidate_id"]).with_row_index("row")
    return numbered.join(wanted, on="candidate_id", how="semi").collect(engine="streaming").sort("row")


def nonfinite_latents(path: Path) -> set[str]:
    """Return the candidate_id of every candidate whose latents hold NaN or infinity.

    Raises:
        UserError: a file is damaged.
    """
    ids: set[str] = set()
    for batch in read_batches(path, ["candidate_id", "latents"]):
        for key, latents in zip(batch["candidate_id"].to_pylist(), batch["latents"], strict=True):
            # float16 NaN and infinity have all exponent bits set
            if latents.is_valid and (np.frombuffer(latents.as_buffer(), "<u2") & 0x7C00 == 0x7C00).any():
                ids.add(key)
    return ids


def latents_bytes(latents: np.ndarray) -> bytes:
    """Return the cell of a latents column: float16 [channels, height, width] in memory order."""
    return np.ascontiguousarray(latents, "<f2").tobytes()


def latents_array(row: Mapping[str, Any], column: str = "latents") -> np.ndarray:
    """Return a row's latents: float16 [channels, height, width], multiplied by the VAE's scaling factor."""
    return np.frombuffer(row[column], "<f2").reshape(row["latents_shape"])


class RowReader:
    """Random access to a dataset's rows by number, counted over all shards in name order.

    Rows are read by row group, with one copy from file to array; as fast as from memory-mapped files, whose pages would
    add to the process's memory.

    Attributes:
        schema: of the dataset.
        num_rows: of all shards.
    """

    def __init__(self, path: Path) -> None:
        """Read the footers of a dataset (a folder, or one file), and no rows.

        Raises:
            UserError: a file is damaged, or there is none.
        """
        self.path = path
        self._groups: list[tuple[Path, int]] = []
        self.schema = pa.schema([])
        counts = [0]
        for shard in shards(path):
            with _opened(shard, None) as file:
                if self._groups and file.schema_arrow.names != self.schema.names:
                    raise UserError(f"{shard}: has other columns than {self._groups[-1][0].name}; rerun what makes it")
                self.schema = file.schema_arrow
                for number in range(file.num_row_groups):
                    self._groups.append((shard, number))
                    counts.append(file.metadata.row_group(number).num_rows)
        self._starts = np.cumsum(counts)
        self.num_rows = int(self._starts[-1])
        self._open = lru_cache(OPEN_SHARDS)(_parquet_file)

    @cached_property
    def shapes(self) -> np.ndarray:
        """Return int32 [num_rows, 3]: channels, height and width of each row's latents, zeros where it has none.

        Raises:
            UserError: a file is damaged or lacks the column.
        """
        shapes = table(self.path, ["latents_shape"])["latents_shape"]
        return shapes.fill_null([0, 0, 0]).list.to_array(3).to_numpy()

    def take(self, numbers: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows with these ascending numbers, one table per row group; other row groups are not read.

        Raises:
            UserError: a file is damaged or lacks a column.
        """
        for group, begin, end in self._spans(numbers):
            yield self._read(group, columns).take(numbers[begin:end] - self._starts[group])

    def latents(self, numbers: Sequence[int] | np.ndarray, column: str = "latents") -> np.ndarray:
        """Return float16 [n, channels, height, width]: the latents of the rows with these numbers, in their order.

        Args:
            column: `latents` or `loser_latents`.

        Raises:
            UserError: a file is damaged or lacks the column, a row has no latents, or rows differ in shape.
        """
        numbers = np.asarray(numbers)
        ascending = np.argsort(numbers, kind="stable")
        latents = None
        for group, begin, end in self._spans(numbers[ascending]):
            cells = self._read(group, [column])[column]
            for position in ascending[begin:end]:
                cell = cells[int(numbers[position] - self._starts[group])]
                shape = self.shapes[numbers[position]].tolist()
                if not cell.is_valid:
                    raise UserError(f"{self.path}: row {numbers[position]} has no {column}; rerun select")
                if latents is None:
                    latents = np.empty((len(numbers), *shape), np.float16)
                if latents.shape[1:] != tuple(shape) or len(cell.as_buffer()) != latents[0].nbytes:
                    raise UserError(f"{self.path}: latents of several sizes; rerun generate and select of this round")
                latents[position] = np.frombuffer(cell.as_buffer(), "<f2").reshape(shape)
        return np.empty((0, 0, 0, 0), np.float16) if latents is None else latents

    def has(self, column: str) -> np.ndarray:
        """Return bool [num_rows]: whether a row has a value in this column. Only mixed row groups are read.

        Raises:
            UserError: a file is damaged or lacks the column.
        """
        parts = []
        for group, rows in enumerate(np.diff(self._starts).tolist()):
            if (nulls := self._null_count(group, column)) in (0, rows):
                parts.append(np.full(rows, nulls == 0))
            else:
                parts.append(self._read(group, [column])[column].is_valid().to_numpy())
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _null_count(self, group: int, column: str) -> int | None:
        """Return the number of null values that the footer names, or None."""
        shard, number = self._groups[group]
        with _naming(shard):
            file = self._open(shard)
            _check_columns(file, shard, [column])
            chunk = file.metadata.row_group(number).column(file.schema.names.index(column))
            return chunk.statistics.null_count if chunk.is_stats_set else None

    def _spans(self, numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yield (row group, begin, end) such that the ascending `numbers[begin:end]` are in that row group."""
        groups = np.searchsorted(self._starts, numbers, side="right") - 1
        begin = 0
        for group, members in groupby(groups.tolist()):
            end = begin + sum(1 for _ in members)
            yield group, begin, end
            begin = end

    def _read(self, group: int, columns: Sequence[str] | None) -> pa.Table:
        shard, number = self._groups[group]
        if missing := set(columns or ()) - set(self.schema.names):
            raise UserError(f"{shard}: has no column {sorted(missing)[0]!r}; rerun what makes this file")
        with _naming(shard):
            return self._open(shard).read_row_group(number, columns=columns)


def _parquet_file(shard: Path) -> pq.ParquetFile:
    return pq.ParquetFile(shard, page_checksum_verification=True)


def _leaf(field: pa.Field) -> str:
    """Return the name by which parquet knows a column of this field."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def _row_groups(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Cut and join tables into row groups of about ROW_GROUP_BYTES."""
    waiting: list[pa.Table] = []
    size = rows = 0
    for table in _chain(first, others):
        row_bytes = max(1, table.nbytes // max(1, table.num_rows))
        step = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))
        for start, end in pairwise([*range(0, table.num_rows, step), table.num_rows]):
            waiting.append(table.slice(start, end - start))
            size += (end - start) * row_bytes
            rows += end - start
            if size + row_bytes > ROW_GROUP_BYTES or rows >= ROW_GROUP_ROWS:
                yield pa.concat_tables(waiting)
                waiting = []
                size = rows = 0
    if waiting:
        yield pa.concat_tables(waiting)


def _chain(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from others


def _batch_rows(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Return how many rows of these columns have at most about BATCH_BYTES."""
    if not {IMAGE, LATENTS} & {file.schema_arrow.field(name).type for name in columns}:
        return ROW_GROUP_ROWS
    metadata = file.metadata
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(ROW_GROUP_ROWS, BATCH_BYTES * metadata.num_rows // max(1, size)))


@contextmanager
def _opened(shard: Path, columns: Sequence[str] | None) -> Iterator[pq.ParquetFile]:
    with _naming(shard), pq.ParquetFile(shard, page_checksum_verification=True, pre_buffer=False) as file:
        _check_columns(file, shard, columns)
        yield file


def _check_columns(file: pq.ParquetFile, shard: Path, columns: Sequence[str] | None) -> None:
    schema = file.schema_arrow
    if missing := set(columns or ()) - set(schema.names):
        raise UserError(f"{shard}: has no column {sorted(missing)[0]!r}; rerun what makes this file")
    for name in schema.names if columns is None else columns:
        kind = schema.field(name).type
        if _LARGE.get(kind, kind) != TYPES.get(name, _LARGE.get(kind, kind)):
            raise UserError(f"{shard}: column {name!r} must be {TYPES[name]}, not {kind}; rerun what makes this file")


@contextmanager
def _naming(shard: Path) -> Iterator[None]:
    """Turn errors of reading this file into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # a damaged footer may hold anything
        reason = one_line(error)
        raise UserError(f"{shard}: not a readable parquet file ({reason:.120}); `dvc checkout` restores it") from None
