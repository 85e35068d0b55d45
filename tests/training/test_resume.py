"""A training killed anywhere and started again ends as if nothing had happened, on disk and in MLflow."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from srpo.config.loader import Params, load_params
from srpo.rounds import Round, RoundFiles
from srpo.stages.train import train
from tests.faults.helpers import start
from tests.training.helpers import contents, with_runtime, with_train, write_train

REPO = Path(__file__).parents[2]
STEPS = 7


def folder(root: Path) -> Path:
    (found,) = (root / ".srpo" / "scratch").glob("train@001-*")
    return found


def note(told: list[int], metrics, step: int) -> None:
    told.append(step)


def interrupted(params: Params, root: Path, at: int) -> list[int]:
    """Train 001 and die in the callback of step `at`; the steps that were told."""
    told = []

    def on_step(metrics, step: int) -> None:
        told.append(step)
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Round.of(params, root, "001"), on_step)
    return told


@pytest.mark.parametrize(
    "values",
    [
        {"ema_decay": 0.9, "lr_schedule": "cosine", "warmup_steps": 3},
        {"method": "full", "ema_decay": 0.9},
        {"objective": "dpo"},
    ],
)
def test_resuming_anywhere_gives_the_same_bytes(params: Params, root: Path, values: dict) -> None:
    files = RoundFiles(root, "001")
    wanted = with_runtime(with_train(params, steps=STEPS, **values), checkpoint_every=2)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    for at in (1, 2, 3, 5, STEPS):
        interrupted(wanted, root, at)
        assert len(list(folder(root).glob("state-*.safetensors"))) <= 2
        told: list[int] = []
        train(Round.of(wanted, root, "001"), functools.partial(note, told))
        assert told == list(range(1, STEPS + 1))
        assert contents(files) == undisturbed, f"stopped at step {at}"
        assert not list((root / ".srpo" / "scratch").glob("train@*")), "states of a finished training stay"


def test_several_stops_and_other_runtime_settings(params: Params, root: Path) -> None:
    files, wanted = RoundFiles(root, "001"), with_train(params, steps=STEPS)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    interrupted(with_runtime(wanted, checkpoint_every=1), root, 3)
    interrupted(with_runtime(wanted, checkpoint_every=2, gradient_checkpointing=True), root, 6)
    resumed = interrupted(with_runtime(wanted, checkpoint_every=3, batch_size=2), root, 5)
    assert resumed == [1, 2, 3, 4, 5]
    train(Round.of(with_runtime(wanted, checkpoint_every=100), root, "001"))
    assert contents(files) == undisturbed


@pytest.mark.parametrize("damage", ["flipped", "truncated", "curve", "older"])
def test_a_damaged_state_falls_back_to_the_older(
    params: Params, root: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    caplog.set_level(logging.INFO, "srpo")
    files, wanted = RoundFiles(root, "001"), with_runtime(with_train(params, steps=STEPS), checkpoint_every=2)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    interrupted(wanted, root, 6)
    _, newer = sorted(folder(root).glob("state-*.safetensors"))
    data = newer.read_bytes()
    if damage == "flipped":
        newer.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "truncated":
        newer.write_bytes(data[: len(data) // 2])
    elif damage == "curve":
        newer.write_bytes(data.replace(b'\\"step\\": 3', b'\\"step\\": 8'))
    else:
        newer.unlink()
    train(Round.of(wanted, root, "001"))
    assert ("state-000004.safetensors: damaged" in caplog.text) == (damage != "older")
    assert "resuming after step 2" in caplog.text
    assert contents(files) == undisturbed


def test_other_inputs_start_anew(params: Params, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "srpo")
    wanted = with_runtime(with_train(params, steps=STEPS), checkpoint_every=1)
    interrupted(wanted, root, 4)
    train(Round.of(with_train(wanted, learning_rate=3e-3), root, "001"))
    assert "resuming" not in caplog.text


def test_edits_that_change_no_result_keep_checkpoints(params: Params, root: Path, tmp_path: Path) -> None:
    """Edit a chart and a docstring in a copy of the package between the kill and the resume."""
    files = RoundFiles(root, "001")
    write_train(root, steps=STEPS)
    wanted = with_runtime(load_params(), checkpoint_every=1)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    interrupted(wanted, root, 4)
    package = shutil.copytree(REPO / "srpo", tmp_path / "code" / "srpo")
    with (package / "reporting" / "charts.py").open("a") as file:
        file.write("\nADDED = 1\n")
    loop = package / "training" / "loop.py"
    loop.write_text(loop.read_text().replace('"""The training loop: ', '"""A training loop, with another docstring: '))
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-m", "srpo", "train", "001"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "train 001: resuming after step 3" in done.stderr
    found = contents(files)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] in ([], ["lineage.json"])


def test_sigkill(root: Path, tmp_path: Path) -> None:
    """The command itself, killed by the kernel's hardest signal after its 2nd, 6th and 11th step."""
    files = RoundFiles(root, "001")
    write_train(root, steps=16)
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("runtime:\n", "runtime:\n  checkpoint_every: 1\n"))
    process = start(root, "train", "001")
    process.join()
    assert process.exitcode == 0
    undisturbed = contents(files)
    for at in (2, 6, 11):
        process, deadline = start(root, "train", "001"), time.monotonic() + 120
        pattern = "train@001-*/state-{:06d}.safetensors"
        while not list((root / ".srpo" / "scratch").glob(pattern.format(at))) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert contents(files) == undisturbed, "a killed training changed what was published"
    log = tmp_path / "train.log"
    process = start(root, "train", "001", log=log)
    process.join()
    assert process.exitcode == 0 and "train 001: resuming after step" in log.read_text()
    assert contents(files) == undisturbed

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(load_params().tracking.experiment).experiment_id
    runs = client.search_runs([experiment], "tags.`srpo.round` = '001'", order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2, "a killed training is one run"
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, 17)), "steps are missing or there twice"
    assert [run.data.tags["srpo.current"] for run in runs] == ["false", "true"]
