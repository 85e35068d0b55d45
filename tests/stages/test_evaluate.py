"""Stage evaluate: what a killed one repeats, what processes share, and which odd inputs it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srpo.config.loader import Params, load_params
from srpo.data.records import read_metrics, read_sweep
from srpo.rounds import Round, RoundFiles
from srpo.stages import evaluate as module
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate

ODD_JUDGE = """
import torch

class OddJudge:
    def __init__(self, *arguments):
        self.seen = 0

    def score(self, images, prompts):
        scores = images.float().mean(dim=(1, 2, 3))
        for i in range(len(scores)):
            self.seen += 1
            if self.seen == 3:
                scores[i] = float("nan")
        return scores
"""


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def change(old: str, new: str) -> Params:
    text = Path("params.yaml").read_text()
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new))
    return load_params()


def content(root: Path) -> dict[str, bytes]:
    folder = RoundFiles(root, "base").evaluation
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 1)  # 4 images at 2 guidance scales: 8 units


def test_a_killed_evaluation_repeats_one_unit(
    params: Params, world: Path, small_batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(Round.of(params, world, "base"))
    undisturbed = content(world)
    real, sampled = module.sample_images, []

    def dies_in_the_last(*arguments, **options):
        sampled.append(arguments[4].guidance_scale)
        if len(sampled) == 8:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "sample_images", dies_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Round.of(params, world, "base"))
    sampled.clear()
    evaluate(Round.of(params, world, "base"))
    assert len(sampled) == 1 and content(world) == undisturbed
    assert not list((world / ".srpo/scratch").glob("evaluate@*"))


def test_other_settings_start_over(params: Params, world: Path, small_batches, monkeypatch) -> None:
    real, sampled = module.sample_images, []

    def dies_in_the_third(*arguments, **options):
        sampled.append(arguments[4].num_inference_steps)
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "sample_images", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Round.of(params, world, "base"))
    settings = params.evaluate.model_copy(update={"num_inference_steps": 2})
    evaluate(Round.of(params.model_copy(update={"evaluate": settings}), world, "base"))
    assert sampled == [3] * 3 + [2] * 8


@pytest.mark.slow
def test_processes_share_and_change_no_byte(params: Params, world: Path) -> None:
    change("images_per_prompt: 2", "images_per_prompt: 70")  # 140 images: 3 units a guidance scale

    def run(processes: int) -> dict[str, bytes]:
        change("batch_size: 64", f"batch_size: 64\n  processes: {processes}")
        subprocess.run([sys.executable, "-m", "srpo", "evaluate", "base"], check=True, env=environment(), cwd=world)
        change(f"batch_size: 64\n  processes: {processes}", "batch_size: 64")
        return content(world)

    assert run(1) == run(2)


@pytest.mark.slow
def test_a_kill_of_two_processes_loses_two_units(params: Params, world: Path) -> None:
    change("images_per_prompt: 2", "images_per_prompt: 160")  # 320 images: 5 units a guidance scale
    change("batch_size: 64", "batch_size: 64\n  processes: 2")
    command = [sys.executable, "-m", "srpo", "evaluate", "base"]
    process = subprocess.Popen(command, env=environment(), cwd=world, start_new_session=True)
    while len(units(world)) < 6:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {unit: unit.stat().st_mtime_ns for unit in units(world)}
    process = subprocess.Popen(command, env=environment(), cwd=world)
    while process.poll() is None and all(unit.exists() for unit in kept):
        assert {unit: unit.stat().st_mtime_ns for unit in kept if unit.exists()} == kept or not units(world)
        time.sleep(0.05)
    assert process.wait() == 0
    assert read_metrics(RoundFiles(world, "base"))["images"] == 320


def units(root: Path) -> list[Path]:
    return sorted((root / ".srpo/scratch").glob("evaluate@base-*/guidance-*.safetensors"))


def environment() -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


def test_one_nan_of_a_judge_is_left_out(world: Path) -> None:
    (world / "odd_judge.py").write_text(ODD_JUDGE)
    params = change("  accuracy: {kind", "  odd: {kind: 'odd_judge:OddJudge', role: judge}\n  accuracy: {kind")
    pin_base(Round.of(params, world, "base"))
    evaluate(Round.of(params, world, "base"))
    sweep = read_sweep(RoundFiles(world, "base"))
    assert sweep["1.0"]["odd_missing"] == 1 and "odd_missing" not in sweep["2.0"]
    assert sweep["1.0"]["odd_low"] <= sweep["1.0"]["odd"] <= sweep["1.0"]["odd_high"]


def test_one_image_per_prompt_has_no_diversity(world: Path) -> None:
    from tests.support.world import write_prompts

    params = change("images_per_prompt: 2", "images_per_prompt: 1")
    write_prompts(world / "data/prompts/train.jsonl", ["a red circle", "a red square"], "train")
    write_prompts(world / "data/prompts/eval.jsonl", ["a green square", "a blue circle", "a blue square"], "eval")
    pin_base(Round.of(params, world, "base"))
    evaluate(Round.of(params, world, "base"))
    assert "diversity" not in read_metrics(RoundFiles(world, "base"))
