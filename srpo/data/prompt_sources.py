"""Sources of prompts: text, CSV, JSON, JSON lines and parquet files, folders of these, and data sets of the Hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srpo.errors import UserError, one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w.-]+)?")
FIELD_LIMIT = 1 << 24  # characters of a CSV field; the module's own limit is 128 KiB
Row = tuple[str, dict[str, str]]
"""A prompt as it stands in the source, and its tags."""


def read_source(source: str, column: str, tags: Sequence[str], split: str) -> Iterator[Row]:
    """Yield the prompts of one source, in its order.

    Args:
        source: a file, a folder whose files are all read in name order, or a data set of the Hub, `owner/name` or
            `owner/name@revision`.
        column: column or key of the prompt. Text files have one prompt a line instead.
        tags: columns or keys whose values become tags of that name. A mapping `tags` is kept, too.
        split: of a data set of the Hub.

    Raises:
        UserError: no such source, a damaged file, or rows without the column.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
        if not files:
            raise UserError(f"{source}: no file there ends in {', '.join(READERS)}; name a folder of prompts")
        for file in files:
            yield from _read_file(file, column, tags)
    elif path.is_file():
        yield from _read_file(path, column, tags)
    elif HUB_ID.fullmatch(source):
        yield from _read_hub(source, column, tags, split)
    else:
        raise UserError(f"{source}: no such file or folder, and no data set id of the Hub (owner/name)")


def _read_file(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: can't be read by its ending; use one of {', '.join(READERS)}")
    try:
        yield from read(path, column, tags)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path}: can't be read ({one_line(error):.160}); mend or remove it") from None


def _read_text(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield line, {}


def _read_csv(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(FIELD_LIMIT)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        _require(path, rows.fieldnames or (), column, tags)
        for row in rows:
            yield _pick(row, column, tags)


def _read_json(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(found, dict) and isinstance(found.get(column), list):  # a column of texts
        found = found[column]
    if not isinstance(found, list):
        raise ValueError(f"neither a list nor an object with a list {column!r}")
    for number, row in enumerate(found, start=1):
        yield _from_object(row, f"{path}: item {number}", column, tags)


def _read_json_lines(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _from_object(json.loads(line), f"{path}:{number}", column, tags)


def _read_parquet(path: Path, column: str, tags: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _require(path, names, column, tags)
        wanted = [name for name in names if name in {column, "tags", *tags}]
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield _pick(row, column, tags)


def _read_hub(source: str, column: str, tags: Sequence[str], split: str) -> Iterator[Row]:
    name, _, revision = source.partition("@")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading from the Hub needs the package datasets; pip install 'srpo[hub]'") from None
    try:
        rows = datasets.load_dataset(name, split=split, revision=revision or None, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
        _require(source, names, column, tags)
        for row in rows.select_columns([name for name in names if name in {column, "tags", *tags}]):
            yield _pick(row, column, tags)
    except UserError:
        raise
    except Exception as error:  # of the network, of the Hub, or of what the data set holds
        reason = f"{type(error).__name__}: {one_line(error):.160}"
        raise UserError(
            f"{source}: can't be read from the Hub, split {split!r} ({reason}); check id, split and network"
        ) from None


def _require(source: Path | str, names: Sequence[str], column: str, tags: Sequence[str]) -> None:
    for option, name in (("--column", column), *(("--tag", tag) for tag in tags)):
        if name not in names:
            raise UserError(f"{source}: has no column {name!r}; choose {option} from {', '.join(map(str, names))}")


def _from_object(row: object, place: str, column: str, tags: Sequence[str]) -> Row:
    if isinstance(row, str):
        return row, {}
    if not isinstance(row, dict):
        raise UserError(f"{place}: neither a text nor an object with {column!r}")
    if column not in row:
        raise UserError(f"{place}: has no key {column!r}; choose --column from {', '.join(row)}")
    return _pick(row, column, tags)


def _pick(row: Mapping[str, Any], column: str, tags: Sequence[str]) -> Row:
    text, kept = row[column], row.get("tags")
    values = dict(kept) if isinstance(kept, dict) else {}
    values |= {name: row.get(name) for name in tags}
    return text if isinstance(text, str) else "", {
        str(name): " ".join(str(value).split()) for name, value in values.items() if value not in (None, "")
    }


READERS: dict[str, Callable[[Path, str, Sequence[str]], Iterator[Row]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
