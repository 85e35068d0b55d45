"""Stage score: candidates that are no images are marked, counted and never win."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.data.scores import read_scores
from srpo.errors import UserError
from srpo.rewards.batches import is_flat
from srpo.rounds import Round, RoundFiles
from srpo.runtime import distributed
from srpo.stages import score as score_stage
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from tests.support.campaign import write_score_files


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def table_of(params: Params, files: RoundFiles) -> pl.DataFrame:
    return read_scores(files.scores, {name: spec.role for name, spec in params.rewards.items()})


def spoil(candidates: Path, change) -> None:
    """Rewrite every shard with `change(row, latents)` applied."""
    for shard in parquet.shards(candidates):
        rows = list(parquet.read_rows(shard))
        for row in rows:
            latents = parquet.latents_array(row).copy()
            change(row, latents.reshape(-1))
            row["latents"] = parquet.latents_bytes(latents)
        parquet.write_table(shard, rows, CANDIDATE_FIELDS)


def test_invalid_candidates_never_win(params: Params, world: Path, caplog) -> None:
    files = RoundFiles(world, "001")
    generate(Round.of(params, world, "001"))
    score(Round.of(params, world, "001"))
    select(Round.of(params, world, "001"))
    assert json.loads((files.winners / "selection.json").read_text())["invalid"] == 0
    first = pl.read_parquet(parquet.shards(files.winners), columns=["candidate_id"])["candidate_id"].to_list()

    def change(row: dict, latents: np.ndarray) -> None:
        if row["candidate_id"] == first[0]:
            row["image"] = encode_image(np.zeros((32, 32, 3), np.uint8))
        if row["candidate_id"] == first[1]:
            latents[-1] = np.nan
        if row["candidate_id"] == first[2]:
            latents[0] = np.inf

    spoil(files.candidates, change)
    with caplog.at_level("INFO", logger="srpo"):
        score(Round.of(params, world, "001"))
        select(Round.of(params, world, "001"))
    table = table_of(params, files)
    assert set(table.filter("invalid")["candidate_id"]) == set(first[:3])
    assert table["reward"].is_finite().all(), "invalid candidates are scored all the same"
    winners = pl.read_parquet(parquet.shards(files.winners), columns=["candidate_id", "loser_id"])
    assert winners.height == 4 and not set(first[:3]) & {*winners["candidate_id"], *winners["loser_id"]}
    assert json.loads((files.winners / "selection.json").read_text())["invalid"] == 3
    assert "select 001: 3 invalid candidates" in caplog.text


def test_odd_rewards_are_counted(params: Params, world: Path, caplog) -> None:
    files = RoundFiles(world, "001")
    generate(Round.of(params, world, "001"))
    score(Round.of(params, world, "001"))
    table = table_of(params, files)
    reward = pl.when(pl.col("prompt_id") == "train-0000").then(1.0).otherwise(pl.col("reward"))
    reward = pl.when(pl.col("prompt_id") == "train-0001").then(float("nan")).otherwise(reward)
    write_score_files(params, files, table.with_columns(reward.cast(pl.Float32).alias("reward")).to_dicts())
    select(Round.of(params, world, "001"))
    summary = json.loads((files.winners / "selection.json").read_text())
    assert (summary["prompts"], summary["winners"]) == (4, 3)
    assert (summary["not_finite_reward"], summary["constant_prompts_reward"]) == (3, 1)
    assert summary["candidates_reward"] == pytest.approx(
        table.with_columns(reward.alias("reward")).filter(pl.col("reward").is_finite())["reward"].mean(), rel=1e-5
    )
    assert "select 001: reward is NaN or infinite for 3 candidates; reward is constant for 1 prompts" in caplog.text


def test_another_judge_costs_its_own_scores(params: Params, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a judge to a scored round, and take it away: what select depends on stays byte by byte."""
    files, base, loaded = RoundFiles(world, "001"), RoundFiles(world, "base"), []
    load = score_stage.load_rewards

    def note(specs: dict, *arguments) -> dict:
        loaded.append(list(specs))
        return load(specs, *arguments)

    def contents() -> dict[str, bytes]:
        paths = [*sorted(files.scores.rglob("*.parquet")), base.folder / "selecting.json"]
        return {str(path.relative_to(world)): path.read_bytes() for path in paths}

    generate(Round.of(params, world, "001"))
    score(Round.of(params, world, "001"))
    select(Round.of(params, world, "001"))
    before = contents()
    monkeypatch.setattr(score_stage, "load_rewards", note)
    path = world / "params.yaml"
    text = path.read_text()
    path.write_text(text.replace("rewards:\n", "rewards:\n  other: {kind: clip, model: data/judge, role: judge}\n", 1))
    pin_base(Round.of(load_params(), world, "base"))
    score(Round.of(load_params(), world, "001"))
    after = contents()
    assert loaded == [["other"]]
    assert after == before | {"rounds/001/scores/judge/other.parquet": after["rounds/001/scores/judge/other.parquet"]}
    path.write_text(text)
    pin_base(Round.of(load_params(), world, "base"))
    score(Round.of(load_params(), world, "001"))
    assert loaded == [["other"]] and contents() == before
    assert not {"judge", "accuracy", "other"} & {*pl.read_parquet_schema(parquet.shards(files.winners)[0])}


def test_all_candidates_invalid(params: Params, world: Path) -> None:
    files = RoundFiles(world, "001")
    generate(Round.of(params, world, "001"))
    black = encode_image(np.zeros((32, 32, 3), np.uint8))
    spoil(files.candidates, lambda row, _: row.update(image=black))
    score(Round.of(params, world, "001"))
    with pytest.raises(UserError, match=r"rounds\.001\.select: no winner is left of 12 candidates \(12 invalid\)"):
        select(Round.of(params, world, "001"))


def test_models_are_compared_once_before_workers_start(
    params: Params, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(Round.of(params, world, "001"))
    with (world / "data" / "judge" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    monkeypatch.setattr(distributed, "run", lambda *_, **__: pytest.fail("workers were started"))
    shared = params.model_copy(update={"runtime": params.runtime.model_copy(update={"processes": 2})})
    with pytest.raises(UserError, match=r"rewards\.judge\.model: .* has changed since stage base ran"):
        score(Round.of(shared, world, "001"))


def test_is_flat() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[1] = torch.tensor([255, 0, 7]).view(3, 1, 1)
    images[2, 1, 2, 3] = 1
    assert is_flat(images).tolist() == [True, True, False]


def test_broken_latents_across_row_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = [rng.normal(size=3 + i % 5).astype(np.float16) for i in range(150)]
    for i in (0, 63, 64, 149):
        latents[i][0 if i % 2 else -1] = np.nan
    rows = [{"candidate_id": f"c{i}", "latents": parquet.latents_bytes(values)} for i, values in enumerate(latents)]
    rows[7]["latents"] = None
    fields = {name: CANDIDATE_FIELDS[name] for name in ("candidate_id", "latents")}
    parquet.write_table(tmp_path / "shard.parquet", rows, fields)
    assert parquet.nonfinite_latents(tmp_path) == {"c0", "c63", "c64", "c149"}
