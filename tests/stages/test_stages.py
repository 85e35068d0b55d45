"""The stages on a random-weight world: what their files hold, and what may not change them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.lineage.record import WEIGHTS_FILE, read_lineage
from srpo.reporting.table import verdict
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.gate import gate
from srpo.stages.generate import generate
from srpo.stages.report import report
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from srpo.tracking.records import round_record
from srpo.training.model import make_trainable
from tests.support.world import sampling_params


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def with_batch_size(params: Params, size: int) -> Params:
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"batch_size": size})})


def run_round(params: Params, root: Path, key: str) -> RoundFiles:
    for stage in (generate, score, select, train):
        stage(Round.of(params, root, key))
    return RoundFiles(root, key)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_two_rounds_chain_and_their_adapters_open_in_plain_diffusers(params: Params, world: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    from srpo.sampling.sampler import Sampler

    first, second = run_round(params, world, "001"), run_round(params, world, "002")
    lineage = read_lineage(RoundFiles(world, "002"))
    assert lineage["parent_adapter"] == read_lineage(RoundFiles(world, "001"))["adapter"]
    assert lineage["base"] == read_lineage(RoundFiles(world, "base"))["base"]
    one, two = (load_file(files.adapter / WEIGHTS_FILE) for files in (first, second))
    assert one.keys() == two.keys()
    plain = StableDiffusionXLPipeline.from_pretrained(world / "data" / "base")
    plain.load_lora_weights(second.adapter)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32}
    theirs = plain(prompt="a red circle", output_type="latent", **options).images
    sampler = Sampler(params, second.adapter)
    embeds = sampler.encode(["a red circle"])
    ours = sampler.denoise(noise, embeds[[0]], embeds[[-1]], sampling_params(3, 1.0))
    assert torch.allclose(ours, theirs, atol=2e-4)
    untouched = Sampler(params).denoise(noise, embeds[[0]], embeds[[-1]], sampling_params(3, 1.0))
    assert not torch.allclose(ours, untouched, atol=2e-4), "the adapter changes nothing"


def test_training_twice_gives_the_same_bytes(params: Params, world: Path) -> None:
    files, seen = run_round(params, world, "001"), []
    before = content(files.adapter), files.training.read_bytes()
    train(Round.of(params, world, "001"), lambda metrics, step: seen.append({"step": step} | metrics))
    assert (content(files.adapter), files.training.read_bytes()) == before
    assert seen == pl.read_csv(files.training).rows(named=True), "the live curve is not the file's"


def test_evaluation_pairs_base_and_round(params: Params, world: Path) -> None:
    evaluate(Round.of(params, world, "base"))
    run_round(params, world, "001")
    evaluate(Round.of(params, world, "001"))
    gate(Round.of(params, world, "001"))
    base, tuned = read_metrics(RoundFiles(world, "base")), read_metrics(RoundFiles(world, "001"))
    assert base["verdict"] == "-" and tuned["verdict"] in ("pass", "fail")
    assert read_sweep(RoundFiles(world, "001")).keys() == {"1.0", "2.0"}
    assert not any(isinstance(value, dict | list) for value in tuned.values()), "dvc metrics show wants it flat"
    record, sweep = read_gate(RoundFiles(world, "001")), read_sweep(RoundFiles(world, "001"))["2.0"]
    assert {
        "judge_win_rate",
        "accuracy_win_rate",
        "fid_ratio",
        "kid_increase",
        "diversity_ratio",
        "unbacked_reward",
    } < set(record["rules"])
    assert (
        record["verdict"]
        == tuned["verdict"]
        == ("pass" if all(r["passed"] for r in record["rules"].values()) else "fail")
    )
    assert tuned["judge_win_rate_low"] == record["win_rate"]["judge"]["best"]["low"]
    assert all(tuned[name] == sweep[name] for name in ("images", "judge", "fid", "kid", "cmmd", "diversity"))
    assert base["drift"] == base["drift_kid"] == 0 < tuned["drift"]
    keys = ["prompt_id", "index", "guidance"]
    tables = [
        pl.read_parquet(RoundFiles(world, key).evaluation / "per_prompt.parquet").select(keys)
        for key in ("base", "001")
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].height == 2 * 2 * 2

    report(Round.of(params, world, "001"))  # their own tests are about a drawn campaign; this is a real one
    run = round_record(Round.of(params, world, "001"))
    assert {"fid", "judge_win_rate", "sweep/kid"} <= {name for name, _, _ in run.curves["evaluation"]}
    assert {"train/loss"} <= {name for name, _, _ in run.curves["training"]}
    assert run.tags["srpo.verdict"] == verdict(tuned)
    assert {"report/index.html", "report/winners.png", "report/tuned.png", "lineage.json"} <= set(run.artifacts)


def test_a_round_that_is_base_is_even_with_it(params: Params, world: Path) -> None:
    evaluate(Round.of(params, world, "base"))
    round = Round.of(params, world, "001")
    untrained = make_trainable(Sampler(params).unet, round, with_reference=False, dtype=torch.float32)
    untrained.save(RoundFiles(world, "001").adapter)  # a LoRA starts as no change
    evaluate(Round.of(params, world, "001"))
    gate(Round.of(params, world, "001"))
    base, same, record = (
        read_metrics(RoundFiles(world, "base")),
        read_metrics(RoundFiles(world, "001")),
        read_gate(RoundFiles(world, "001")),
    )
    assert same["drift_kid"] == 0 and same["drift"] < 1e-6 and same["fid"] == base["fid"]
    for rates in record["win_rate"].values():
        assert all((rate["value"], rate["low"], rate["high"]) == (0.5, 0.5, 0.5) for rate in rates.values())
    assert (record["verdict"], record["finding"]) == ("pass", "no better than its parent")
    assert all(look["z"] == 0 for look in record["image_stats"].values())


def test_evaluation_does_not_depend_on_batch_size_or_cache(params: Params, world: Path, monkeypatch) -> None:
    files, found = RoundFiles(world, "base"), []
    for size in (1, 3):
        evaluate(Round.of(with_batch_size(params, size), world, "base"))
        found.append(content(files.evaluation))
    shutil.rmtree(world / ".srpo" / "cache")
    evaluate(Round.of(params, world, "base"))
    assert found[0] == found[1] == content(files.evaluation)


def test_evaluation_holds_one_batch_of_images(params: Params, world: Path, monkeypatch) -> None:
    module, asked = sys.modules["srpo.stages.evaluate"], []
    monkeypatch.setattr(module, "BATCH", 3)
    real = module.sample_images
    monkeypatch.setattr(module, "sample_images", lambda *a, **k: asked.append(len(a[2])) or real(*a, **k))
    evaluate(Round.of(params, world, "base"))
    assert asked == [3, 1, 3, 1]


def test_a_judge_without_features_can_not_make_them(params: Params, world: Path) -> None:
    from srpo.errors import UserError

    settings = params.evaluate.model_copy(update={"clip_features": "accuracy"})
    with pytest.raises(UserError, match=r"evaluate\.features: rewards\.accuracy has no image features"):
        evaluate(Round.of(params.model_copy(update={"evaluate": settings}), world, "base"))


def test_rank_can_not_change_between_parent_and_child(params: Params, world: Path) -> None:
    from srpo.errors import UserError

    run_round(params, world, "001")
    for stage in (generate, score, select):
        stage(Round.of(params, world, "002"))
    text = (world / "params.yaml").read_text()
    (world / "params.yaml").write_text(text.replace("rank: 2", "rank: 3"))
    with pytest.raises(UserError, match=r"rounds\.002\.train"):
        train(Round.of(load_params(), world, "002"))
