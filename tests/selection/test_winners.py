"""What stage `select` writes: the winners' own rows, their losers' latents, and weights to train by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.stages.select import select
from srpo.storage.scratch import scratch_folder
from tests.support.campaign import build_campaign, write_score_files

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
            latents = parquet.latents_bytes(np.full(4, len(rows) + 1))
            image = encode_image(np.full((2, 2, 3), len(rows), np.uint8))
            rows.append(
                {"prompt": f"a {prompt}", "seed": len(rows), "image": image, "latents": latents}
                | {"latents_shape": [1, 2, 2], "steps": 3, "guidance": 1.5}
                | identity
                | odd.get(name.rpartition("-")[2] + prompt, {})
            )
            scores.append(identity | dict.fromkeys(params.rewards, value) | {"invalid": False})
    parquet.write_table(files.candidates / "shard-00000.parquet", rows[:3], CANDIDATE_FIELDS)
    parquet.write_table(files.candidates / "shard-00001.parquet", rows[3:], CANDIDATE_FIELDS)
    write_score_files(params, files, scores)
    return rows


def test_winners_have_loser_latents(campaign) -> None:
    """Also from another shard (q's loser), and null where the winner is its own loser or the loser has none."""
    params, root = campaign
    rewards = {"p": [1.0, 3.0], "q": [0.0, 2.0, 1.0], "r": [1.0], "s": [0.0, 1.0]}
    made = write_round(root, rewards, params, **{"0000s": {"latents": None}})
    select(Round.of(params, root, KEY))
    found = {row["prompt_id"]: row for row in parquet.read_rows(RoundFiles(root, KEY).winners)}
    assert {name: row["index"] for name, row in found.items()} == {"p": 1, "q": 1, "r": 0, "s": 1}
    assert found["p"]["loser_latents"] == made[0]["latents"]
    assert found["q"]["loser_latents"] == made[2]["latents"]
    assert found["r"]["loser_latents"] is None and found["s"]["loser_latents"] is None
    for row in found.values():
        own = next(one for one in made if one["candidate_id"] == row["candidate_id"])
        assert row["latents"] == own["latents"] and row["image"] == own["image"] and row["seed"] == own["seed"]


def test_shards_and_row_groups_change_nothing(campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the candidates' nor the winners': small ones hold the same rows; a killed run's shards do not stay."""
    params, root = campaign
    rewards = {f"p{i}": [float((i * k) % 7) for k in range(5)] for i in range(9)} | {"r": [1.0]}
    write_round(root, rewards, params)
    select(Round.of(params, root, KEY))
    out = RoundFiles(root, KEY).winners
    whole = pl.read_parquet(out / "*.parquet")
    assert len(list(out.glob("*.parquet"))) == 1 and whole["loser_latents"].null_count() == 1
    monkeypatch.setattr("srpo.data.parquet.ROW_GROUP_ROWS", 2)
    write_round(root, rewards, params)
    monkeypatch.setattr("srpo.selection.winners.SHARD_BYTES", 1)
    select(Round.of(params, root, KEY))
    assert len(list(out.glob("*.parquet"))) > 3 and pl.read_parquet(out / "*.parquet").equals(whole)
    stale = scratch_folder(root, "select", KEY) / "shard-99999.parquet"
    stale.write_bytes((out / "shard-00000.parquet").read_bytes())
    select(Round.of(params, root, KEY))
    assert pl.read_parquet(out / "*.parquet").equals(whole)


def test_unfinished_candidates_never_win(campaign) -> None:
    params, root = campaign
    nothing = {"0000p": {"image": None, "latents": None}}
    write_round(root, {"p": [None, 1.0, 2.0], "q": [1.0, 0.0]}, params, **nothing)
    select(Round.of(params, root, KEY))
    out = RoundFiles(root, KEY).winners
    found = {row["prompt_id"]: row for row in parquet.read_rows(out)}
    assert found["p"]["index"] == 2 and found["p"]["loser_id"] == "001-p-0001"
    summary = json.loads((out / "selection.json").read_text())
    assert (summary["unfinished"], summary["invalid"], summary["not_finite_reward"]) == (1, 0, 0)


@pytest.mark.parametrize("lost", [2, 3], ids=["a winner", "a loser"])
def test_scores_of_other_candidates_are_an_error(campaign, lost: int) -> None:
    params, root = campaign
    files = RoundFiles(root, KEY)
    rows = write_round(root, {"p": [1.0, 2.0], "q": [2.0, 1.0]}, params)
    (files.candidates / "shard-00001.parquet").unlink()
    kept = [row for i, row in enumerate(rows) if i != lost]
    parquet.write_table(files.candidates / "shard-00000.parquet", kept, CANDIDATE_FIELDS)
    with pytest.raises(UserError, match=r"scores: does not match.*rerun score"):
        select(Round.of(params, root, KEY))
    assert not files.winners.exists()
