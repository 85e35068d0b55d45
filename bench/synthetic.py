"""Synthetic candidates and scores in any number, in the project's own schema, without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from srpo.data import parquet
from srpo.data import scores as score_files
from srpo.data.images import encode_images
from srpo.data.schemas import CANDIDATE_FIELDS, IDENTITY_FIELDS, IMAGE, arrow_schema
from srpo.rounds import RoundFiles

PROMPTS_PER_SHARD = 1 << 15


def write_candidates(
    files: RoundFiles,
    prompts: int,
    per_prompt: int,
    images: Sequence[np.ndarray],
    shape: tuple[int, int, int] = (4, 2, 2),
    prompts_per_shard: int = PROMPTS_PER_SHARD,
) -> None:
    """Write a round's candidates, a shard at a time: random latents of this shape, and these images in turn."""
    cells = [cell["bytes"] for cell in encode_images(images)]
    parts = _parts(prompts, prompts_per_shard)
    for number, part in enumerate(parts):
        name = f"shard-{number:05d}-of-{len(parts):05d}.parquet"
        parquet.write_arrow(files.candidates / name, [_candidates(files.key, part, per_prompt, cells, shape)])


def write_scores(files: RoundFiles, prompts: int, per_prompt: int, names: Sequence[str]) -> None:
    """Write scores/select: normal numbers for every reward; one candidate in a thousand is invalid."""
    paths = {name: score_files.score_path(files.scores, name, "select") for name in names} | {
        "invalid": score_files.invalid_path(files.scores)
    }
    for name, path in paths.items():
        tables = (_scores(files.key, part, per_prompt, names) for part in _parts(prompts))
        score_files.write_scores(path, name, tables, "synthetic")


def _parts(prompts: int, size: int = PROMPTS_PER_SHARD) -> list[range]:
    starts = range(0, prompts, size)
    return [range(start, min(start + size, prompts)) for start in starts]


def _identity(key: str, prompts: range, per_prompt: int) -> pl.DataFrame:
    number = pl.Series("number", np.repeat(np.arange(prompts.start, prompts.stop), per_prompt))
    index = pl.Series("index", np.tile(np.arange(per_prompt, dtype=np.int32), len(prompts)))
    name = pl.format("train-{}", pl.col("number").cast(pl.String).str.zfill(7))
    rows = pl.DataFrame([number, index]).with_columns(name.alias("prompt_id"))
    place = pl.col("index").cast(pl.String).str.zfill(4)
    return rows.with_columns(pl.format("{}-{}-{}", pl.lit(key), "prompt_id", place).alias("candidate_id"))


def _candidates(
    key: str, prompts: range, per_prompt: int, cells: Sequence[bytes], shape: tuple[int, int, int]
) -> pa.Table:
    rows = _identity(key, prompts, per_prompt)
    count, rng = rows.height, np.random.default_rng(prompts.start)
    texts = pl.format("a photo of subject {} in the style of painter {}", "number", pl.col("number") % 97)
    columns = {name: rows[name].to_arrow() for name in ("candidate_id", "prompt_id", "index")}
    columns["prompt"] = rows.select(texts.alias("prompt"))["prompt"].to_arrow()
    columns["seed"] = pa.array(rng.integers(0, 1 << 62, count))
    columns["image"] = pa.StructArray.from_arrays(
        [pa.array([cells[i % len(cells)] for i in range(count)]), pa.nulls(count, pa.string())],
        fields=list(IMAGE),
    )
    columns["latents"] = pa.array([parquet.latents_bytes(row) for row in rng.normal(size=(count, math.prod(shape)))])
    sides = pa.array(np.tile(np.array(shape, np.int32), count))
    columns["latents_shape"] = pa.ListArray.from_arrays(pa.array(np.arange(0, 3 * count + 1, 3, dtype=np.int32)), sides)
    columns |= {"steps": pa.repeat(30, count), "guidance": pa.repeat(5.0, count)}
    schema = arrow_schema(CANDIDATE_FIELDS)
    # a column unknown here is null
    arrays = [columns.get(field.name, pa.nulls(count, field.type)).cast(field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _scores(key: str, prompts: range, per_prompt: int, names: Sequence[str]) -> pa.Table:
    rows = _identity(key, prompts, per_prompt)
    rng = np.random.default_rng(prompts.start + 1)
    fields = dict(IDENTITY_FIELDS)
    columns = [rows[name].to_arrow().cast(kind) for name, kind in fields.items()]
    for name in names:
        fields[name] = pa.float32()
        columns.append(pa.array(rng.normal(20, 1, rows.height).astype(np.float32)))
    columns.append(pa.array(rng.random(rows.height) < 0.001))
    return pa.Table.from_arrays(columns, schema=arrow_schema(fields | {"invalid": pa.bool_()}))
