"""Passes, recomputed activations and processes change how a step is computed, not what it gives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE
from srpo.rounds import Round, RoundFiles
from srpo.stages.train import train
from tests.training import two_processes
from tests.training.helpers import losses, with_runtime, with_train

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_add_up_over_passes(params: Params, root: Path, method: str, objective: str) -> None:
    files = RoundFiles(root, "001")
    wanted = with_train(params, method=method, objective=objective, dpo_beta=20.0, steps=5, batch_size=5)
    train(Round.of(wanted, root, "001"))
    whole = losses(files)
    for size in (1, 2):
        train(Round.of(with_runtime(wanted, train_batch_size=size), root, "001"))
        assert losses(files) == pytest.approx(whole, rel=1e-4)
        assert losses(files)[0] != losses(files)[1]
    train(Round.of(with_runtime(wanted, train_batch_size=5), root, "001"))
    assert losses(files) == whole


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_losses(
    params: Params, root: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, wanted, used = RoundFiles(root, "001"), with_train(params, method=method, objective="nft"), []
    train(Round.of(wanted, root, "001"))
    plain = losses(files)
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: used.append(1) or real(*a, **k))
    train(Round.of(with_runtime(wanted, gradient_checkpointing=True), root, "001"))
    assert used and losses(files) == pytest.approx(plain, rel=1e-5)


def test_the_moving_average_is_what_is_published(params: Params, root: Path) -> None:
    """Its decay warms up: min(decay, (1 + t) / (10 + t)) from the second step on."""
    files, weights, decay = RoundFiles(root, "001"), [], 0.15
    wanted = with_train(params, method="full", lr_schedule="constant", warmup_steps=0, learning_rate=1e-2)
    for steps in (1, 2, 3, 4):
        train(Round.of(with_train(wanted, steps=steps), root, "001"))
        weights.append(load_file(files.adapter / UNET_FILE))
    train(Round.of(with_train(wanted, steps=4, ema_decay=decay), root, "001"))
    found = load_file(files.adapter / UNET_FILE)
    for name, value in found.items():
        mean = weights[0][name].double()
        for t, new in enumerate(weights[1:], 1):
            kept = min(decay, (1 + t) / (10 + t))
            mean = kept * mean + (1 - kept) * new[name].double()
        assert torch.allclose(value.double(), mean, atol=1e-6), name
    assert any(not torch.allclose(value, weights[-1][name], atol=1e-4) for name, value in found.items())


def launched(root: Path) -> None:
    """The cases under torch's launcher, as `runtime.processes` has them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "tests.training.two_processes"]
    process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=400) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_train_as_one_does(params: Params, root: Path) -> None:
    expected = {}
    for name in two_processes.CASES:
        key, wanted = two_processes.case(params, name)
        train(Round.of(with_runtime(wanted, train_batch_size=None), root, key))
        files = RoundFiles(root, key)
        expected[name] = losses(files), load_file(files.adapter / WEIGHTS_FILE)
    launched(root)
    for name, (one, weights) in expected.items():
        folder = root / "two" / name
        assert pl.read_csv(folder / "training.csv")["loss"].to_list() == pytest.approx(one, rel=1e-4), name
        found = load_file(folder / "adapter" / WEIGHTS_FILE)
        assert found.keys() == weights.keys()
        assert all(torch.allclose(found[key], weights[key], atol=2e-4) for key in weights), name
    assert (root / "two" / "told").read_text() == "0" * sum(len(one) for one, _ in expected.values())


def test_more_processes_than_samples_is_refused(params: Params, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import srpo.stages.train as stage

    class Four:
        num_processes = 4

    monkeypatch.setattr(stage, "Accelerator", lambda **_: Four())
    with pytest.raises(UserError, match=r"runtime\.processes: 4 can't share a batch of 2"):
        train(Round.of(with_train(params, batch_size=2), root, "001"))
