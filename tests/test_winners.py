"""What stage `select` writes: the winners' own rows, their losers' latents, and weights to train by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from srpo import datasets
from srpo.params import Params
from srpo.rounds import RoundFiles
from srpo.select import select
from tests.campaign import build_campaign

KEY = "001"


@pytest.fixture
def campaign(tmp_path: Path) -> tuple[Params, Path]:
    return build_campaign(tmp_path, rounds=()), tmp_path


def write_round(root: Path, rewards: dict[str, list[float | None]], params: Params, **odd) -> list[dict]:
    """Candidates and scores of round 001: for every prompt these rewards; each candidate has latents of its own."""
    files, rows, scores = RoundFiles(root, KEY), [], []
    for prompt, values in rewards.items():
        for index, value in enumerate(values):
            name = f"{KEY}-{prompt}-{index:04d}"
            identity = {"candidate_id": name, "prompt_id": prompt, "index": index}
            latents = np.full(4, len(rows) + 1, np.float16)
            image = datasets.encode_png(np.full((2, 2, 3), len(rows), np.uint8))
            rows.append(
                {"prompt": f"a {prompt}", "seed": len(rows), "image": image, "latents": latents}
                | {"latents_shape": [1, 2, 2], "steps": 3, "guidance": 1.5}
                | identity
                | odd.get(name.rpartition("-")[2] + prompt, {})
            )
            scores.append(identity | dict.fromkeys(params.rewards, value) | {"rejected": False})
    datasets.write_table(files.candidates / "shard-00000.parquet", rows[:3], datasets.CANDIDATE_FIELDS)
    datasets.write_table(files.candidates / "shard-00001.parquet", rows[3:], datasets.CANDIDATE_FIELDS)
    fields = {"candidate_id": pa.string(), "prompt_id": pa.string(), "index": pa.int32()}
    fields |= dict.fromkeys(params.rewards, pa.float32()) | {"rejected": pa.bool_()}
    datasets.write_table(files.scores, scores, fields)
    return rows


def test_losers_latents_come_along(campaign) -> None:
    """Also from another shard (q's loser), and null where the winner is its own loser or the loser has none."""
    params, root = campaign
    rewards = {"p": [1.0, 3.0], "q": [0.0, 2.0, 1.0], "r": [1.0], "s": [0.0, 1.0]}
    made = write_round(root, rewards, params, **{"0000s": {"latents": None}})
    select(params, root, KEY)
    found = {row["prompt_id"]: row for row in datasets.read_rows(RoundFiles(root, KEY).winners)}
    assert {name: row["index"] for name, row in found.items()} == {"p": 1, "q": 1, "r": 0, "s": 1}
    assert found["p"]["loser_latents"] == list(made[0]["latents"])
    assert found["q"]["loser_latents"] == list(made[2]["latents"])
    assert found["r"]["loser_latents"] is None and found["s"]["loser_latents"] is None
    for row in found.values():
        own = next(one for one in made if one["candidate_id"] == row["candidate_id"])
        assert row["latents"] == list(own["latents"]) and row["image"] == own["image"] and row["seed"] == own["seed"]
