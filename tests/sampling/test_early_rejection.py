"""Early rejection: who goes on, that nothing but the setting decides it, and what the audit says."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo.config.loader import Params, load_params
from srpo.config.schema import GenerateParams
from srpo.data import parquet
from srpo.data.scores import read_scores
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.selection.audit import audit, is_audited, survivors
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.storage.json_files import write_json
from tests.support.world import sampling_params

RULES = {
    "reward": "reward",
    "checkpoints": [{"step": 1, "keep": 3}, {"step": 2, "keep": 2}],
    "audit_fraction": 0.0,
    "preview_scale": 1,
}


@pytest.fixture
def params(world: Path) -> Params:
    found = with_generate(load_params(), candidates_per_prompt=5, num_inference_steps=4)
    pin_base(Round.of(with_rules(found), world, "base"))
    return found


def with_generate(params: Params, **values) -> Params:
    settings = GenerateParams.model_validate(params.generate.model_dump() | values)
    return params.model_copy(update={"generate": settings})


def with_rules(params: Params, **values) -> Params:
    return with_generate(params, early_rejection=RULES | values)


def with_batch_size(params: Params, size: int) -> Params:
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"batch_size": size})})


def candidates(params: Params, root: Path) -> list[dict]:
    generate(Round.of(params, root, "001"))
    return list(parquet.read_rows(RoundFiles(root, "001").candidates))


def test_survivors_do_not_depend_on_batches(params: Params, world: Path) -> None:
    plain, rules = candidates(params, world), with_rules(params)
    found = [candidates(with_batch_size(rules, size), world) for size in (1, 3, 16)]
    found.append(candidates(with_generate(rules, prompts_per_shard=3), world))
    assert all(rows == found[0] for rows in found)
    assert sorted(row["stopped_at"] for row in found[0]) == [1] * 8 + [2] * 4 + [4] * 8
    for row, whole in zip(found[0], plain, strict=True):
        assert row["stopped_at"] == row["would_stop_at"] and not row["audited"]
        assert len(row["preview_scores"]) == min(row["stopped_at"], 2)
        if row["stopped_at"] == 4:
            own = ("preview_scores",)
            assert {k: v for k, v in row.items() if k not in own} == {k: v for k, v in whole.items() if k not in own}
        else:
            assert row["image"] is row["latents"] is row["latents_shape"] is None


def test_audited_prompts_finish_all_candidates(params: Params, world: Path) -> None:
    stopped, audited = candidates(with_rules(params), world), candidates(with_rules(params, audit_fraction=1.0), world)
    assert [row["would_stop_at"] for row in audited] == [row["stopped_at"] for row in stopped]
    assert all(row["image"] and row["audited"] and row["stopped_at"] == 4 for row in audited)
    for mine, theirs in zip(audited, stopped, strict=True):
        assert mine["preview_scores"][: len(theirs["preview_scores"])] == pytest.approx(
            theirs["preview_scores"], abs=1e-3
        )


def test_rejected_candidates_have_null_scores(params: Params, world: Path) -> None:
    import datasets as hf

    rules = with_rules(params, audit_fraction=0.5, preview_scale=2)
    rows = candidates(rules, world)
    score(Round.of(rules, world, "001"))
    files = RoundFiles(world, "001")
    scores = read_scores(files.scores, {"reward": "select"})
    gone = {row["candidate_id"] for row in rows if row["image"] is None}
    assert 0 < len(gone) < 20 and {row["audited"] for row in rows} == {True, False}
    assert set(scores.filter(pl.col("invalid"))["candidate_id"]) == gone
    assert set(scores.filter(pl.col("reward").is_null())["candidate_id"]) == gone
    assert scores["candidate_id"].to_list() == [row["candidate_id"] for row in rows]
    pattern = str(files.candidates / "*.parquet")
    loaded = hf.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(world / "hf"))
    assert sum(row["image"] is None for row in loaded) == len(gone)
    found = audit(pl.scan_parquet(parquet.shards(files.candidates)), scores, rules.generate)
    assert found["rejection_audited_prompts"] * 5 == sum(row["audited"] for row in rows)
    assert found["rejection_unet_evaluations"] == sum(row["stopped_at"] for row in rows)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_sampling_in_segments_equals_sampling_at_once(params: Params, world: Path, name: str, prediction: str) -> None:
    import diffusers

    from srpo.sampling.sampler import Sampler, seeded

    sampler = Sampler(params)
    config = dict(sampler.pipeline.scheduler.config) | {"prediction_type": prediction, "clip_sample": False}
    sampler.pipeline.scheduler = getattr(diffusers, name).from_config(config)
    embeds, noise = sampler.encode(["a red circle"]), sampler.noise(seeded([1]), 32, 32)
    way = (embeds[[0]], embeds[[-1]])
    whole, _ = sampler.advance(noise, *way, range(4), sampling_params(4))
    first, clean = sampler.advance(noise, *way, range(1), sampling_params(4))
    assert torch.equal(sampler.advance(first, *way, range(1, 4), sampling_params(4))[0], whole)
    scheduler = sampler.pipeline.scheduler  # from x = a x_0 + s e: what x_0 and the step's end say must agree
    scheduler.set_timesteps(4)
    if name == "EulerDiscreteScheduler":
        sigma, following = scheduler.sigmas[:2]
        start = noise * scheduler.init_noise_sigma
        expected = start + (start - clean) / sigma * (following - sigma)
        assert torch.allclose(expected, first, atol=1e-4)
    assert not torch.allclose(clean, first)


def test_schedulers_with_history_are_refused(params: Params, world: Path) -> None:
    path = world / "data" / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "beta_schedule": "scaled_linear"}))
    index = world / "data" / "base" / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "UniPCMultistepScheduler"))
    pin_base(Round.of(with_rules(params), world, "base"))
    with pytest.raises(UserError, match=r"generate\.early_rejection: .*UniPCMultistepScheduler keeps history"):
        generate(Round.of(with_rules(params), world, "001"))
    generate(Round.of(params, world, "001"))


def test_flat_previews_have_no_score(params: Params, world: Path) -> None:
    from srpo.rewards.loading import load_reward
    from srpo.sampling.early_rejection import EarlyRejection
    from srpo.sampling.sampler import Sampler

    reward = load_reward(params.rewards["reward"], world, torch.device("cpu"))
    images = torch.randint(0, 255, (3, 32, 32, 3), dtype=torch.uint8)
    images[1] = 7
    scores = EarlyRejection(Sampler(params), with_rules(params).generate, reward)._scores(images, "a red circle")
    assert [score == score for score in scores] == [True, False, True]


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=2), st.data())
def test_the_best_survive(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores) - 1))
    kept = survivors(scores, keep)
    assert len(kept) == keep and kept == sorted(set(kept))
    finite = [score if abs(score) < float("inf") else float("-inf") for score in scores]  # NaN, too
    for lost in set(range(len(scores))) - set(kept):
        assert all(finite[one] > finite[lost] or (finite[one] == finite[lost] and one < lost) for one in kept)


def test_audits_are_nested() -> None:
    prompts = [f"p{i}" for i in range(2000)]
    tenth, half = ({p for p in prompts if is_audited(f, 0, "001", p)} for f in (0.1, 0.5))
    assert 150 < len(tenth) < 250 and tenth < half
    assert all(is_audited(1.0, 0, "001", p) and not is_audited(0.0, 0, "001", p) for p in prompts)


def test_regret_formula() -> None:
    rules = RULES | {"checkpoints": [{"step": 2, "keep": 2}]}
    settings = GenerateParams.model_validate(
        {"candidates_per_prompt": 4, "num_inference_steps": 4, "guidance_scale": 1, "height": 32, "width": 32}
        | {"early_rejection": rules}
    )
    previews = {"a": [4, 3, 2, 1], "b": [1, 2, 3, 4], "c": [2, 1, 0, 0]}
    finals = {"a": [8, 6, 4, 2], "b": [7, 1, 2, 3], "c": [5, 1, None, None]}
    keeps = {"a": [4, 4, 2, 2], "b": [2, 2, 4, 4], "c": [4, 4, 2, 2]}
    rows = [
        {
            "prompt_id": p, "candidate_id": f"{p}{i}", "preview_scores": [float(previews[p][i])],
            "stopped_at": keeps[p][i] if p == "c" else 4, "would_stop_at": keeps[p][i], "audited": p != "c",
        }
        for p in "abc" for i in range(4)
    ]  # fmt: skip
    scores = [
        {"candidate_id": f"{p}{i}", "reward": finals[p][i], "invalid": finals[p][i] is None}
        for p in "abc" for i in range(4)
    ]  # fmt: skip
    found = audit(pl.LazyFrame(rows), pl.DataFrame(scores), settings)
    # a: best 8, left 8, mean 5; b: best 7, left 3, mean 3.25; Spearman 1 and -0.2
    assert found == {
        "rejection_audited_prompts": 2,
        "rejection_regret": 2.0,
        "rejection_gain": pytest.approx((3 + 3.75) / 2),
        "rejection_regret_share": pytest.approx(2 / 3.375),
        "rejection_same_best": 0.5,
        "rejection_rank_correlation_2": pytest.approx((1 - 0.2) / 2),
        "rejection_unet_evaluations": 32 + 12,
        "rejection_unet_evaluations_share": pytest.approx(44 / 48),
        "rejection_unet_evaluations_share_unaudited": pytest.approx(12 / 16),
    }
    assert audit(pl.LazyFrame(rows), pl.DataFrame(scores), settings.model_copy(update={"early_rejection": None})) == {}


def test_preview_json_names_one_reward(params: Params, world: Path) -> None:
    path = RoundFiles(world, "base").preview
    before = json.loads(path.read_text())
    assert before.keys() == {"reward"}
    (world / "data" / "judge" / "README.md").write_text("another judge")
    pin_base(Round.of(with_rules(params), world, "base"))
    assert json.loads(path.read_text()) == before
    (world / "data" / "reward" / "README.md").write_text("another reward")
    pin_base(Round.of(with_rules(params), world, "base"))
    assert json.loads(path.read_text()) != before
    pin_base(Round.of(params, world, "base"))
    assert json.loads(path.read_text()) == {}


def test_report_and_mlflow_show_the_audit(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    from srpo.stages.report import report
    from srpo.tracking.records import round_record
    from tests.support.campaign import build_campaign, write_score_files

    build_campaign(tmp_path, ("001",))
    raw = YAML(typ="safe").load((tmp_path / "params.yaml").read_text())
    raw["generate"]["early_rejection"] = {"reward": "reward", "checkpoints": [{"step": 3, "keep": 3}]}
    write_json(tmp_path / "params.yaml", raw)
    files, params = RoundFiles(tmp_path, "001"), load_params(tmp_path / "params.yaml")
    scores = read_scores(files.scores, {name: spec.role for name, spec in params.rewards.items()})
    loser_ids = pl.scan_parquet(parquet.shards(files.winners)).select("loser_id").collect()["loser_id"]
    winner_ids = pl.scan_parquet(parquet.shards(files.winners)).select("candidate_id").collect()["candidate_id"]
    gone = ~pl.col("candidate_id").is_in(pl.concat([loser_ids, winner_ids]).to_list())
    names = list(params.rewards)
    scores = scores.with_columns(pl.when(gone).then(None).otherwise(pl.col(names)).name.keep())
    assert scores["reward"].null_count()
    write_score_files(params, files, scores.to_dicts())
    path = files.winners / "selection.json"
    told = {"rejection_regret": 0.125, "rejection_regret_share": None, "rejection_rank_correlation_3": 0.625}
    write_json(path, json.loads(path.read_text()) | told)
    report(Round.of(params, tmp_path, "001"))
    page = (files.report / "index.html").read_text()
    assert "<h2>Early rejection</h2>" in page and "rank correlation of preview and final reward, step 3" in page
    assert "0.125" in page and "0.625" in page
    assert "selection.json" in round_record(Round.of(params, tmp_path, "001")).artifacts
    without = params.model_copy(update={"generate": params.generate.model_copy(update={"early_rejection": None})})
    report(Round.of(without, tmp_path, "001"))
    assert "Early rejection" not in (files.report / "index.html").read_text()
