"""The flow over a real DVC workspace with stub stages and a real Prefect server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client

from flows.errors import BadInput, StageDied
from flows.names import artifact_key
from flows.rounds import needed, srpo_rounds
from flows.stages import reproduce
from srpo.config.loader import load_params
from srpo.runtime import fork_server
from tests.flows.conftest import REPO, ran, stages


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "retry_delay_seconds", [0, 0])


def run_flow(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.rounds", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a signal can go to all of it, as Ctrl-C does
    )


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_stages_run_in_order_and_are_retried(workspace: Path, prefect_server) -> None:
    (workspace / "trouble-train-001").write_text("die once")
    srpo_rounds(rounds=["001"])
    first = stages("001")
    first.insert(first.index("train@001"), "train@001")
    assert ran(workspace) == ["base@base", "evaluate@base", *first]
    srpo_rounds(rounds=["002"])
    assert ran(workspace) == stages("002")
    assert srpo_rounds(rounds=["002"]) == "0 stages ran, 16 were cached (nothing changed)"
    assert ran(workspace) == []
    srpo_rounds(rounds=["001"], force=True)
    assert ran(workspace) == stages("001")

    with get_client(sync_client=True) as client:
        names = {(run.name, run.state.name) for run in client.read_task_runs(limit=200)}
        tables = [a for a in client.read_artifacts() if a.key == artifact_key("metrics")]
    assert {("train@001", "Completed"), ("train@001", "Cached"), ("evaluate-base", "Cached")} <= names
    rows = json.loads(sorted(tables, key=lambda artifact: artifact.created)[-1].data)
    assert [row["round"] for row in rows] == ["base", "001", "002"] and rows[1]["verdict"] == "pass"


def test_without_the_fork_server(workspace: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE)
    monkeypatch.delenv(fork_server.REQUEST_VARIABLE, raising=False)
    flow = run_flow("--stage", "base")
    commands = []
    while flow.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            commands += [" ".join(child.cmdline()) for child in psutil.Process(flow.pid).children(recursive=True)]
        time.sleep(0.2)
    assert flow.returncode == 0, flow.stdout.read()
    assert ran(workspace) == ["base@base"]
    assert any("-m dvc --wait-for-lock repro" in command for command in commands)
    assert not any("fork_server_process" in command for command in commands)


def test_push_after_each_stage(workspace: Path, prefect_server) -> None:
    remote = workspace / "remote"
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", str(remote)], check=True)
    (workspace / "trouble-score-001").write_text("bad input")
    with pytest.raises(BadInput):
        srpo_rounds(rounds=["001"], push=True)
    pushed = {path.read_text() for path in remote.rglob("*") if path.is_file()}
    assert {"basebase", "evaluatebase", "generate001"} <= pushed


def test_bad_input_is_not_retried(workspace: Path, prefect_server, capfd) -> None:
    (workspace / "trouble-evaluate-base").write_text("bad input")
    with pytest.raises(BadInput, match=r"^params\.yaml: seed: too odd$"):
        srpo_rounds()
    assert ran(workspace) == ["base@base", "evaluate@base"]
    assert "Traceback" not in capfd.readouterr().err


def test_missing_dependency_is_bad_input(workspace: Path, prefect_server) -> None:
    for file in (workspace / "data" / "prompts").iterdir():
        file.unlink()
    with pytest.raises(BadInput, match=r"^evaluate-base: data/prompts/train\.jsonl does not exist; `dvc pull` "):
        srpo_rounds()
    assert ran(workspace) == ["base@base"]
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_task_runs(limit=200) if run.name == "evaluate-base"]
    assert max(runs, key=lambda run: run.created).run_count == 1, "tried again"


def test_dying_stage_is_tried_three_times(workspace: Path, prefect_server) -> None:
    (workspace / "trouble-base-base").write_text("die")
    # -9 under a shell that gives its own process to its last command, 137 under one that does not
    with pytest.raises(StageDied, match=r"srpo base, exited with (-9|137)"):
        srpo_rounds()
    assert ran(workspace) == ["base@base"] * 3


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]
)
def test_no_process_outlives_the_flow(
    workspace: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, number: int, whole_group: bool
) -> None:
    if number == signal.SIGTERM:  # the others start a Prefect server of their own, which must end with them
        monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    (workspace / "trouble-evaluate-base").write_text("hang")
    flow = run_flow()
    hanging = next(line for line in flow.stdout if "hanging" in line)
    family = [psutil.Process(int(pid)) for pid in hanging.split("hanging ")[1].split()]
    family += psutil.Process(flow.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(flow.pid, number)
    end = time.monotonic() + 30
    while not all(map(is_gone, family)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [process for process in family if not is_gone(process)] == []
    output = flow.stdout.read()
    assert flow.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--round", "009"), "rounds: no round '009' in params.yaml; it has 001, 002, 003"),
        ((), "params.yaml: seed: "),
    ],
)
def test_bad_parameters(workspace: Path, change, message) -> None:
    if not change:
        params = workspace / "params.yaml"
        params.write_text(params.read_text().replace("seed: 0", "seed: odd", 1))
    flow = run_flow(*change)
    output = flow.communicate(timeout=60)[0].strip()
    assert flow.returncode == 2
    assert output.startswith(f"srpo: error: {message}") and "\n" not in output
    assert ran(workspace) == []


def test_unreachable_server(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://someone:hunter2@127.0.0.1:9/api")
    flow = run_flow()
    output = flow.communicate(timeout=120)[0]
    assert flow.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("srpo: error: ")]
    assert "Prefect's server at http://127.0.0.1:9/api does not answer (ConnectError); start it" in line
    assert "hunter2" not in output and "Traceback" not in output and ran(workspace) == []


def test_ancestors_are_included() -> None:
    params = load_params(REPO / "params.yaml")
    assert needed(params, ["002"]) == ["001", "002"]
    assert needed(params, None) == list(params.rounds)


@pytest.mark.slow
def test_sleeping_retry_does_not_delay_the_exit(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPO_RETRY_DELAY", "600")
    (workspace / "trouble-base-base").write_text("die")
    flow = run_flow()
    next(line for line in flow.stdout if "AwaitingRetry" in line or "Retry 1/2" in line)
    flow.send_signal(signal.SIGINT)
    flow.stdout.read()
    assert flow.wait(60) == 130
