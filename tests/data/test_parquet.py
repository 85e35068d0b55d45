"""Datasets on disk: random access to latents, lazy columns, row groups, formats that others read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.parquet import RowReader
from srpo.data.schemas import CANDIDATE_FIELDS, RESERVED
from srpo.errors import UserError

SHAPE = (4, 3, 5)
STOPPED = {3, 11, 12}


def latents_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float16)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty candidates in three shards, four rows per row group; those in STOPPED have no image and no latents."""
    monkeypatch.setattr("srpo.data.parquet.ROW_GROUP_ROWS", 4)
    rows = [
        {"candidate_id": f"c{i}", "prompt_id": f"p{i // 4}", "index": i % 4, "seed": i}
        | ({} if i in STOPPED else {"latents": parquet.latents_bytes(latents_of(i)), "latents_shape": list(SHAPE)})
        | ({} if i in STOPPED else {"image": encode_image(np.full((2, 2, 3), i, np.uint8))})
        for i in range(30)
    ]
    for shard in range(3):
        path = tmp_path / f"shard-{shard:05d}.parquet"
        parquet.write_table(path, rows[10 * shard : 10 * shard + 10], CANDIDATE_FIELDS)
    return tmp_path


def test_latents_come_in_the_order_asked_for(dataset: Path) -> None:
    reader = RowReader(dataset)
    numbers = [29, 0, 10, 9, 10]
    latents = reader.latents(numbers)
    assert (reader.num_rows, latents.dtype, latents.shape) == (30, np.float16, (5, *SHAPE))
    assert np.array_equal(latents, np.stack([latents_of(number) for number in numbers]))
    assert set(np.flatnonzero(~reader.has("latents"))) == STOPPED


def test_one_row_reads_one_row_group(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RowReader(dataset)
    read = []
    original = RowReader._read
    monkeypatch.setattr(
        RowReader, "_read", lambda self, group, columns: read.append(group) or original(self, group, columns)
    )
    reader.latents([17, 16])
    assert read == [4], "row 17 is in the second row group of the second shard"


def test_missing_latents_and_other_sizes_are_errors(dataset: Path) -> None:
    with pytest.raises(UserError, match="row 11 has no latents"):
        RowReader(dataset).latents([1, 11])
    row = {"candidate_id": "x", "latents": bytes(8), "latents_shape": [1, 2, 2]}
    parquet.write_table(dataset / "shard-00003.parquet", [row], CANDIDATE_FIELDS)
    with pytest.raises(UserError, match="several sizes"):
        RowReader(dataset).latents([1, 30])


def test_a_query_reads_only_its_columns(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = parquet.read_batches
    monkeypatch.setattr(
        "srpo.data.parquet.read_batches", lambda path, columns: asked.append(list(columns)) or original(path, columns)
    )
    query = parquet.scan(dataset, ["candidate_id", "index", "seed", "image"])
    found = query.filter(pl.col("index") == 3).select("candidate_id").collect(engine="streaming")
    assert found["candidate_id"].to_list() == [f"c{i}" for i in range(3, 30, 4)]
    assert {name for columns in asked for name in columns} == {"candidate_id", "index"}
    assert query.head(13).collect()["seed"].to_list() == list(range(13))


def test_row_groups_do_not_depend_on_the_tables(tmp_path: Path) -> None:
    whole = pa.table({"seed": np.arange(100_000)})
    parquet.write_arrow(tmp_path / "a.parquet", [whole])
    parquet.write_arrow(tmp_path / "b.parquet", [whole.slice(start, 1000) for start in range(0, 100_000, 1000)])
    groups = [pq.read_metadata(tmp_path / f"{name}.parquet").num_row_groups for name in "ab"]
    assert groups == [2, 2]
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))


def test_hugging_face_datasets_opens_it(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in parquet.shards(dataset)]
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    assert np.asarray(rows[1]["image"]).tolist() == np.full((2, 2, 3), 1).tolist()
    latents = np.frombuffer(rows[1]["latents"], "<f2").reshape(rows[1]["latents_shape"])
    assert np.array_equal(latents, latents_of(1)) and rows[3]["latents"] is None


def test_reserved_names_are_all_columns() -> None:
    assert {"latents_shape", "loser_latents", "invalid", "guidance", "seed", "margin"} <= RESERVED


def test_shards_with_other_columns_are_an_error(dataset: Path) -> None:
    parquet.write_table(dataset / "shard-00003.parquet", [{"seed": 1}], {"seed": pa.int64()})
    with pytest.raises(UserError, match=r"shard-00003\.parquet: has other columns"):
        RowReader(dataset)
