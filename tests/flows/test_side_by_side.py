"""Sibling rounds run in parallel, within the slots of the limit `gpu`, and fail independently."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

from flows import concurrency, progress
from flows.errors import BadInput
from flows.names import artifact_key
from flows.rounds import plan, srpo_rounds
from flows.stages import reproduce
from srpo.config.loader import load_params
from srpo.errors import UserError
from tests.flows.conftest import REPO, ran


@pytest.fixture
def siblings(workspace: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose rounds 001 and 001b both stand on base."""
    monkeypatch.setattr(reproduce, "retry_delay_seconds", [0, 0])
    params = workspace / "params.yaml"
    text = params.read_text().replace('"002":\n    parent: "001"', '"001b":\n    parent: base', 1)
    params.write_text(text.replace('parent: "002"', 'parent: "001b"'))
    return workspace


def set_slots(count: int) -> None:
    concurrency.ensure_limit()
    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(concurrency.LIMIT, GlobalConcurrencyLimitUpdate(limit=count))


def test_two_slots_run_siblings_in_parallel(siblings: Path) -> None:
    set_slots(2)
    for key in ("001", "001b"):
        (siblings / f"trouble-generate-{key}").write_text("meet")
    srpo_rounds(rounds=["001", "001b"], stages=["base", "generate"])
    assert ran(siblings)[0] == "base@base" and (siblings / "rounds/001b/candidates/x").exists()


@pytest.mark.slow
def test_one_slot_runs_siblings_in_sequence(siblings: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_slots(1)
    for key in ("001", "001b"):
        (siblings / f"trouble-generate-{key}").write_text("linger")
    srpo_rounds(rounds=["001", "001b"], stages=["base", "generate", "score"])
    spans = [line.split() for line in (siblings / "spans.txt").read_text().splitlines()]
    assert len(spans) == 2 * (1 + 2 + 2)
    assert all(a[0] == "start" and b == ["end", a[1]] for a, b in zip(spans[::2], spans[1::2], strict=True)), spans
    assert "Waiting for a slot" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "waiting is no error"


@pytest.mark.slow
def test_failure_ends_its_branch_only(siblings: Path) -> None:
    set_slots(2)
    (siblings / "trouble-generate-001").write_text("bad input")
    with pytest.raises(BadInput, match=r"^params\.yaml: seed: too odd$"):
        srpo_rounds(rounds=["001", "001b"], stages=["base", "generate", "score"])
    assert sorted(ran(siblings)) == ["base@base", "generate@001", "generate@001b", "score@001b"]


@pytest.mark.slow
def test_two_flows_by_hand_share_a_database(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each starts its own Prefect server, both on the same SQLite file."""
    other = shutil.copytree(workspace, tmp_path_factory.mktemp("other") / "project")
    command = [sys.executable, "-m", "flows.rounds", "--round", "001", "--stage", "base", "--stage", "generate"]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    flows = [
        subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for root in (workspace, other)
    ]
    for flow in flows:
        words, _ = flow.communicate(timeout=540)
        assert flow.returncode == 0, words
        assert "2 stages ran" in words
        assert not re.search(r"ERROR|CRITICAL|Traceback|database is locked", words), words


def test_existing_limit_keeps_its_slots(prefect_server: str) -> None:
    set_slots(3)
    concurrency.ensure_limit()
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(concurrency.LIMIT).limit == 3


def test_plan(siblings: Path) -> None:
    graph = plan(load_params(siblings / "params.yaml"), None)
    assert graph["evaluate-base"] == ["base"]
    assert graph["generate@001"] == graph["generate@001b"] == ["evaluate-base"]
    assert graph["train@001b"] == ["select@001b"] and graph["generate@003"] == ["report@001b"]
    assert plan(load_params(siblings / "params.yaml"), ["003"], ["train"]) == {
        "train@001b": [],
        "train@003": ["train@001b"],
    }


def test_unknown_stage() -> None:
    with pytest.raises(UserError, match=r"stages: no stage 'trian'; use base, "):
        plan(load_params(REPO / "params.yaml"), None, ["trian"])


def artifact(key: str) -> tuple[float, str]:
    with get_client(sync_client=True) as client:
        found = max((a for a in client.read_artifacts() if a.key == key), key=lambda a: a.created)
    return float(found.data), found.description


def test_progress_artifact(prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the project whose identity is in the artifact's key
    calls = []
    update = progress.update_progress_artifact
    monkeypatch.setattr(progress, "update_progress_artifact", lambda *args: (calls.append(args), update(*args)))
    tracker = progress.Progress(["base", "generate@001"])
    monkeypatch.setattr(progress, "EVERY_SECONDS", 1000.0)
    for percent in range(100):
        tracker.update("base", f" {percent}%|### | {percent}/100")
    assert calls == []
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    tracker.end("base", done=True)
    tracker.update("generate@001", "images:  40%|####      | 4/10 [00:04<00:06]")
    assert artifact(artifact_key("progress")) == (70.0, "1 of 2 stages; now generate@001 40 %")


def test_concurrent_dvc_repro(workspace: Path) -> None:
    (workspace / "trouble-base-base").write_text("hang")
    command = [sys.executable, "-m", "srpo.runtime.fork_server", "dvc", "repro", "--single-item", "base"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        next(line for line in first.stdout if "hanging" in line)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode != 0
        assert re.search(r"'.*rounds/base/\S+' is busy, it is being blocked by:\s+\(PID \d+\)", second.stderr)
    finally:
        first.terminate()
        first.wait(30)
    (workspace / "trouble-base-base").unlink()
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert (workspace / "rounds/base/rewards.json").read_text() == "basebase"
