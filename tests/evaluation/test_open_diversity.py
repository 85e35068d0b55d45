"""Diversity over what prompts leave open: collapse lowers it, correcting mistakes does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from srpo.config.loader import load_params
from srpo.config.schema import GateParams
from srpo.data.records import read_metrics, read_sweep
from srpo.errors import UserError
from srpo.evaluation.diversity import open_diversity
from srpo.evaluation.gate import judge_round
from srpo.rounds import Round, RoundFiles
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from tests.evaluation.test_gate import BASE, EVEN, GOOD, UP

JUDGE = """
import torch

class Corners:
    \"\"\"Right if the first pixel is bright; what it leaves open is whether the last two are.\"\"\"

    def __init__(self, *arguments):
        pass

    def score(self, images, prompts):
        return (images[:, 0, 0, 0] > 20).float()

    def attributes(self, images, prompts):
        shown = (images[:, 1:, -1, -1] > 127).long()
        return torch.where(self.score(images, prompts)[:, None] > 0, shown, -1)

class Plain(Corners):
    attributes = property()

class Wrong(Corners):
    def attributes(self, images, prompts):
        return torch.zeros(len(images), 2)
"""
LINE = "  features: judge\n"


def draws(prompts: int, images: int, chances: list[float], right: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One attribute with these chances, among images of which a share is right, and their groups."""
    rng = np.random.default_rng(seed)
    values = rng.choice(len(chances), (prompts * images, 1), p=chances)
    return np.where(rng.random((prompts * images, 1)) < right, values, -1), np.repeat(np.arange(prompts), images)


@pytest.mark.parametrize("images", [3, 20])
@pytest.mark.parametrize("right", [1.0, 0.5])
def test_it_is_the_gini_simpson_index_without_bias(images: int, right: float) -> None:
    """Whatever the number of images and the share of right ones: 1 - .5^2 - .3^2 - .2^2 = .62."""
    found = open_diversity(*draws(4000, images, [0.5, 0.3, 0.2], right, seed=1))
    assert found is not None
    assert found.value == pytest.approx(0.62, abs=0.02)
    assert found.low < found.value < found.high


def test_attributes_count_alike_and_said_ones_not_at_all() -> None:
    attributes = np.array([[0, -1, 0], [1, -1, 0], [-1, -1, -1], [5, 7, -1]])
    found = open_diversity(attributes, ["a", "a", "a", "b"])
    assert found is not None and found.value == 0.5, "1 and 0 of prompt a; b has one image"
    assert open_diversity(attributes[2:], ["a", "b"]) is None


def test_every_pair_of_images_counts_alike() -> None:
    attributes = np.array([[0], [0], [0], [1], [0], [1]])
    found = open_diversity(attributes, ["a", "a", "a", "a", "b", "b"])
    assert found is not None and found.value == pytest.approx((3 + 1) / (6 + 1))


def test_the_gate_takes_it_in_place_of_the_embeddings() -> None:
    limits = GateParams(min_diversity_ratio=0.9)
    base = {key: record | {"open_diversity": 0.6} for key, record in BASE.items()}
    for value, passed in ((0.55, True), (0.53, False)):
        sweep = {key: record | {"open_diversity": value, "diversity": 0.01} for key, record in GOOD.items()}
        found = judge_round(limits, sweep, base, {"judge": UP}, {"reward": EVEN})
        assert found["rules"]["open_diversity_ratio"]["passed"] is passed
        assert "diversity_ratio" not in found["rules"] and (found["verdict"] == "pass") is passed


def with_judge(world: Path, name: str) -> None:
    (world / "corners.py").write_text(JUDGE)
    text = (world / "params.yaml").read_text()
    judge = f'  corners: {{kind: "corners:{name}", role: judge}}\n'
    text = text.replace("rewards:\n", f"rewards:\n{judge}").replace(LINE, f"{LINE}  diversity_judge: corners\n")
    (world / "params.yaml").write_text(text)


def test_evaluate_measures_it(world: Path) -> None:
    with_judge(world, "Corners")
    pin_base(Round.of(load_params(), world, "base"))
    evaluate(Round.of(load_params(), world, "base"))
    files = RoundFiles(world, "base")
    assert 0 <= read_metrics(files)["open_diversity"] <= 1
    assert all({"open_diversity_low", "diversity"} <= set(record) for record in read_sweep(files).values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Plain", "evaluate.diversity_judge: rewards.corners has no attributes; name a judge whose class has"),
        ("Wrong", r"rewards.corners: attributes returned torch.float32 \[\d+, 2\] for \d+ images; it must return"),
    ],
)
def test_a_judge_that_cant_is_refused(world: Path, name: str, message: str) -> None:
    with_judge(world, name)
    pin_base(Round.of(load_params(), world, "base"))
    with pytest.raises(UserError, match=message):
        evaluate(Round.of(load_params(), world, "base"))


def test_a_reward_that_selects_is_refused(world: Path) -> None:
    text = (world / "params.yaml").read_text()
    (world / "params.yaml").write_text(text.replace(LINE, f"{LINE}  diversity_judge: reward\n"))
    with pytest.raises(UserError, match=r"evaluate\.diversity_judge: .reward. is not"):
        load_params()
