"""Scores of a round's candidates: one parquet file per reward, so that a new reward adds a file and changes none.

`rounds/<key>/scores/` holds `select/<reward>.parquet` for rewards that choose winners, `judge/<reward>.parquet` for
the others, and `invalid.parquet`. All have the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from srpo.data import parquet
from srpo.data.schemas import IDENTITY_FIELDS, arrow_schema
from srpo.errors import UserError

if TYPE_CHECKING:
    import polars as pl

INVALID = "invalid"
SOURCE = b"srpo.source"
"""Metadata of a file: the hash of all that its scores depend on."""


def score_path(folder: Path, name: str, role: str) -> Path:
    """Return the file of a reward's scores; `role` is `select` or `judge`."""
    return folder / role / f"{name}.parquet"


def invalid_path(folder: Path) -> Path:
    """Return the file of the column `invalid`."""
    return folder / f"{INVALID}.parquet"


def write_scores(path: Path, name: str, tables: Iterable[pa.Table], source: str) -> None:
    """Write the column `name` of these tables with the candidates' identity.

    Args:
        path: of the file.
        name: a reward or `invalid`.
        tables: at least one, with the columns of `IDENTITY_FIELDS` and `name`.
        source: the hash of all that the column depends on.
    """
    kind = pa.bool_() if name == INVALID else pa.float32()
    schema = arrow_schema(IDENTITY_FIELDS | {name: kind})
    schema = schema.with_metadata((schema.metadata or {}) | {SOURCE: source.encode()})

    def columns() -> Iterator[pa.Table]:
        for table in tables:
            yield table.select(schema.names).cast(schema)

    parquet.write_arrow(path, columns())


def read_source(path: Path) -> str | None:
    """Return the hash that `write_scores` wrote; None if there is no such file, or it is damaged in any page."""
    try:
        for _ in parquet.read_batches(path):
            pass
        return (pq.read_schema(path).metadata or {}).get(SOURCE, b"").decode() or None
    except (UserError, OSError, pa.ArrowException):
        return None


def read_scores(folder: Path, roles: Mapping[str, str]) -> pl.DataFrame:
    """Return candidate_id, prompt_id, index, the columns of these rewards (name to role), and invalid.

    Raises:
        UserError: a file is missing, damaged, or of other candidates.
    """
    scores = parquet.table(invalid_path(folder), [*IDENTITY_FIELDS, INVALID])
    for name, role in roles.items():
        path = score_path(folder, name, role)
        column = parquet.table(path, ["candidate_id", name])
        if not column["candidate_id"].equals(scores["candidate_id"]):
            raise UserError(f"{path}: does not match the candidates of {invalid_path(folder).name}; rerun score")
        scores = scores.with_columns(column[name])
    return scores.select(*IDENTITY_FIELDS, *roles, INVALID)
