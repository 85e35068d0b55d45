"""The gate: every rule can fail, best is compared with best, and a hacked reward is called by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from srpo.config.loader import load_params
from srpo.config.schema import GateParams
from srpo.data.metric_keys import IMAGE_STATS
from srpo.data.records import read_gate, read_metrics
from srpo.evaluation.bootstrap import Estimate, win_rate
from srpo.evaluation.gate import (
    HACKING,
    NO_GAIN,
    best_guidance,
    best_of_sweep,
    image_stat_shifts,
    judge_round,
    unbacked_gain,
)
from srpo.evaluation.image_stats import image_stats
from srpo.rewards.validated import ValidatedReward
from srpo.rounds import Round, RoundFiles
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.gate import gate

UP, EVEN, DOWN = Estimate(0.7, 0.6, 0.8), Estimate(0.5, 0.45, 0.55), Estimate(0.3, 0.2, 0.4)


def measures(**changed: float) -> dict[str, float]:
    values = {"judge": 1.0, "fid": 10.0, "kid": 0.2, "diversity": 0.5}
    return values | dict.fromkeys(IMAGE_STATS, 0.5) | {f"{name}_std": 0.1 for name in IMAGE_STATS} | changed


BASE = {"1.0": measures(), "3.0": measures(fid=20.0)}
GOOD = {"1.0": measures(fid=9.0, kid=0.1), "3.0": measures(fid=20.0)}


def verdict(sweep=GOOD, judges=None, selects=None, **limits) -> dict:
    return judge_round(GateParams(**limits), sweep, BASE, judges or {"judge": UP}, selects or {"reward": UP})


def test_better_round_passes() -> None:
    found = verdict()
    assert found["verdict"] == "pass" and found["finding"] is None
    assert all(rule["passed"] for rule in found["rules"].values())
    assert found["rules"]["fid_ratio"] == {"value": 0.9, "sense": "at most", "limit": 1.0, "passed": True}


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("fid_ratio", {"fid": 10.1}),
        ("kid_increase", {"kid": 0.21}),
        ("diversity_ratio", {"diversity": 0.2}),
        ("saturation_shift", {"saturation": 0.61}),
        ("contrast_shift", {"contrast": 0.39}),
        ("edge_density_shift", {"edge_density": 0.61}),
        ("color_entropy_shift", {"color_entropy": 0.39}),
    ],
)
def test_every_rule_can_fail_alone(rule: str, changed: dict[str, float]) -> None:
    found = verdict({"1.0": GOOD["1.0"] | changed, "3.0": GOOD["3.0"]})
    assert [name for name, at in found["rules"].items() if not at["passed"]] == [rule]
    assert found["verdict"] == "fail" and found["finding"] is None


def test_judge_rule_uses_the_lower_end() -> None:
    lucky = Estimate(0.58, 0.49, 0.67)
    found = verdict(judges={"judge": UP, "other": lucky})
    assert [name for name, rule in found["rules"].items() if not rule["passed"]] == ["other_win_rate"]
    assert found["rules"]["other_win_rate"]["value"] == 0.49
    assert verdict(judges={"judge": UP, "other": lucky}, min_judge_win_rate=0.45)["verdict"] == "pass"


def test_null_limit_disables_a_rule() -> None:
    worse = {"1.0": GOOD["1.0"] | {"kid": 9.0, "saturation": 9.0}}
    assert verdict(worse)["verdict"] == "fail"
    found = verdict(worse, max_kid_increase=None, max_image_stat_shift=None)
    assert found["verdict"] == "pass"
    assert not [name for name in found["rules"] if name == "kid_increase" or name.endswith("_shift")]


def test_missing_scores_have_a_limit() -> None:
    judges, selects = {"judge": UP}, {"reward": UP}
    rules = judge_round(GateParams(), GOOD, BASE, judges, selects, {"judge": 0.1})["rules"]
    assert rules["judge_missing"] == {"value": 0.1, "sense": "at most", "limit": 0.1, "passed": True}
    assert judge_round(GateParams(), GOOD, BASE, judges, selects, {"judge": 0.11})["verdict"] == "fail"


@pytest.mark.parametrize(("rates", "finding"), [([UP, DOWN], None), ([EVEN, DOWN], NO_GAIN), ([EVEN], NO_GAIN)])
def test_a_round_that_no_judge_prefers_to_its_parent(rates: list[Estimate], finding: str | None) -> None:
    over_parent = {f"judge{i}": rate for i, rate in enumerate(rates)}
    record = judge_round(GateParams(), GOOD, BASE, {"judge": UP}, {"reward": UP}, {}, over_parent)
    assert (record["verdict"], record["finding"]) == ("pass", finding)
    hacked = judge_round(GateParams(), GOOD, BASE, {"judge": EVEN}, {"reward": UP}, {}, over_parent)
    assert hacked["finding"] == HACKING


def test_best_of_sweep() -> None:
    sweep = {"1.0": measures(judge=2.0, fid=9.0), "3.0": measures(judge=3.0, fid=20.0)}
    assert best_of_sweep(sweep, ["judge"]) == {"judge_best": 3.0, "fid_best": 9.0}


def test_without_diversity_there_is_no_rule() -> None:
    single = {g: {name: v for name, v in values.items() if name != "diversity"} for g, values in GOOD.items()}
    record = verdict(single)
    assert record["verdict"] == "pass" and "diversity_ratio" not in record["rules"]


def test_best_against_best() -> None:
    baked = {"1.0": measures(fid=9.0, judge=2.0), "3.0": measures(fid=90.0, kid=9.0, saturation=0.9, judge=0.5)}
    assert best_guidance(baked, "fid") == best_guidance(baked, "judge") == "1.0"
    assert verdict(baked)["verdict"] == "pass"
    assert image_stat_shifts(baked, BASE)["saturation"]["z"] == 0
    shifted = image_stat_shifts({"1.0": measures(saturation=0.3)}, BASE)["saturation"]
    assert shifted == pytest.approx({"round": 0.3, "base": 0.5, "base_std": 0.1, "z": -2.0})


@pytest.mark.parametrize(
    ("reward", "judges", "hacked"),
    [
        (UP, [EVEN, EVEN], True),
        (UP, [EVEN, UP], False),
        (UP, [UP, DOWN], True),
        (UP, [DOWN], True),
        (EVEN, [EVEN], False),
        (EVEN, [DOWN], False),
    ],
)
def test_reward_hacking(reward, judges, hacked: bool) -> None:
    named = {f"judge{i}": rate for i, rate in enumerate(judges)}
    found = verdict(judges=named, selects={"reward": reward})
    assert (found["finding"] == HACKING) is hacked is not found["rules"]["unbacked_reward"]["passed"]
    assert not hacked or found["verdict"] == "fail"
    assert unbacked_gain(named, {"reward": reward}) == pytest.approx(0.1 if hacked else 0)


def test_reward_hacking_in_score_tables() -> None:
    """60 prompts of 3 images: the reward rises with saturation, the judges score what they scored before."""
    rng, prompts = np.random.default_rng(1), [f"p{i // 3}" for i in range(180)]
    before = {name: rng.normal(size=180) for name in ("reward", "judge", "other")}
    after = {name: values + 0.3 * rng.normal(size=180) for name, values in before.items()}
    after["reward"] += 0.4
    rates = {name: win_rate(after[name], before[name], prompts) for name in before}
    roles = {name: rates[name] for name in ("judge", "other")}, {"reward": rates["reward"]}
    assert judge_round(GateParams(), GOOD, BASE, *roles)["finding"] == HACKING
    after["judge"] += 0.4
    roles[0]["judge"] = win_rate(after["judge"], before["judge"], prompts)
    assert judge_round(GateParams(), GOOD, BASE, *roles)["finding"] is None


class Saturation:
    """A reward that loves saturation."""

    def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
        return torch.from_numpy(image_stats(images.numpy())["saturation"]).float()


class Indifferent:
    """A judge that sees no difference, with features that do."""

    def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
        return torch.zeros(len(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_saturated_model_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    import sys

    params = load_params()
    pin_base(Round.of(params, world, "base"))
    module = sys.modules["srpo.stages.evaluate"]
    stand_ins = {"reward": Saturation(), "judge": Indifferent(), "accuracy": Indifferent()}
    stand_ins = {name: ValidatedReward(name, reward) for name, reward in stand_ins.items()}
    monkeypatch.setattr(module, "load_pinned_rewards", lambda params, root: stand_ins)
    monkeypatch.setattr(module, "require_weights", lambda files: None)  # base's own images, saturated below
    evaluate(Round.of(params, world, "base"))
    real = module.sample_images

    def saturated(*args, **options):
        latents, images = real(*args, **options)
        grey = images.float().mean(dim=-1, keepdim=True)
        return latents, (grey + 3 * (images.float() - grey)).clamp(0, 255).to(torch.uint8)

    monkeypatch.setattr(module, "sample_images", saturated)
    evaluate(Round.of(params, world, "001"))
    gate(Round.of(params, world, "001"))
    metrics, record = read_metrics(RoundFiles(world, "001")), read_gate(RoundFiles(world, "001"))
    assert record["win_rate"]["reward"]["best"]["low"] > 0.5
    assert (metrics["verdict"], metrics["finding"]) == ("fail", HACKING)
    broken = {name for name, rule in record["rules"].items() if not rule["passed"]}
    assert {"unbacked_reward", "saturation_shift"} <= broken
    assert record["image_stats"]["saturation"]["z"] > 1
    assert any(HACKING in line.getMessage() for line in caplog.records)
