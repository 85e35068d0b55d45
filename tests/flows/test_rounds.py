"""The flow over a real DVC workspace with stand-in stages and a real Prefect server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.rounds import BadInput, srpo_rounds
from srpo import warm

REPO = Path(__file__).parents[2]

# stands where `srpo` would: writes each stage's outputs, notes that it ran, and misbehaves on request
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
stage, key = (sys.argv[1:] + ["base"])[:2]
with open("ran.txt", "a") as log: log.write(stage + "@" + key + "\\n")
trouble = pathlib.Path("trouble-" + stage + "-" + key)
if trouble.exists():
    what = trouble.read_text()
    if what == "bad input":
        print("srpo: error: params.yaml: seed: too odd", file=sys.stderr); sys.exit(2)
    if what == "die once":
        trouble.unlink(); os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        print("hanging", os.getpid(), flush=True); time.sleep(120)
folder = pathlib.Path("rounds", key)
outs = {{
    "base": ["adapter/lineage.json", "rewards.json"], "generate": ["candidates/x"], "score": ["scores.parquet"],
    "select": ["winners/x"], "train": ["adapter/x", "training.csv"], "report": ["report/index.html"],
    "evaluate": ["evaluation/per_prompt.parquet", "evaluation/samples.parquet", "evaluation/guidance.csv"],
    "track": [],
}}[stage]
for out in outs:
    (folder / out).parent.mkdir(parents=True, exist_ok=True)
    (folder / out).write_text(stage + key)
if stage == "evaluate":
    metrics = dict.fromkeys(["reward", "judge", "accuracy", "fid", "kid", "diversity"], 1.0) | {{"verdict": "pass"}}
    (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / file, tmp_path)
    for file in ("data/prompts/train.jsonl", "data/prompts/eval.jsonl", "data/reference/reference.parquet"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    stand_in = tmp_path / "bin" / "srpo"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.delenv(warm.SOCKET_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    return tmp_path


def ran(workspace: Path) -> list[str]:
    path = workspace / "ran.txt"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if not line.startswith("track")]


def stages(*keys: str) -> list[str]:
    names = ("generate", "score", "select", "train", "evaluate", "report")
    return [f"{name}@{key}" for key in keys for name in names]


def test_stages_run_in_order_once_and_a_death_is_retried(workspace: Path, prefect_server, monkeypatch) -> None:
    from flows import rounds as module

    monkeypatch.setattr(module.reproduce, "retry_delay_seconds", [0, 0])
    (workspace / "trouble-train-001").write_text("die once")
    srpo_rounds(rounds=["001"])
    first = stages("001")
    first.insert(first.index("train@001"), "train@001")
    assert ran(workspace) == ["base@base", "evaluate@base", *first]
    srpo_rounds(rounds=["002"])
    assert ran(workspace) == stages("002")
    srpo_rounds(rounds=["001"], force=True)
    assert ran(workspace) == stages("001")


def test_bad_input_is_not_retried_and_says_what_is_wrong(workspace: Path, prefect_server) -> None:
    (workspace / "trouble-evaluate-base").write_text("bad input")
    with pytest.raises(BadInput, match=r"params\.yaml: seed: too odd"):
        srpo_rounds()
    assert ran(workspace) == ["base@base", "evaluate@base"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cancelling_leaves_no_process_behind(workspace: Path, prefect_server, number) -> None:
    (workspace / "trouble-evaluate-base").write_text("hang")
    environ = os.environ | {warm.PRELOAD_VARIABLE: "json"}
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.rounds"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in flow.stdout:
        if "hanging" in line:
            break
    family = psutil.Process(flow.pid).children(recursive=True)
    assert any("trouble" in name or "srpo" in " ".join(p.cmdline()) for p in family for name in [p.name()])
    flow.send_signal(number)
    flow.stdout.read()
    assert flow.wait(60) != 0
    end = time.monotonic() + 20
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_an_unknown_round_is_one_line_and_status_2(workspace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.rounds", "--round", "009"],
        env=os.environ | {warm.PRELOAD_VARIABLE: "json"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "srpo: error: rounds: no round '009' in params.yaml" in done.stderr
    assert ran(workspace) == []


def test_the_deployment_file_names_what_exists() -> None:
    from ruamel.yaml import YAML

    deployment = YAML(typ="safe").load((REPO / "prefect.yaml").read_text())["deployments"][0]
    file, function = deployment["entrypoint"].split(":")
    assert (REPO / file).exists() and function == "srpo_rounds"
    assert set(deployment["parameters"]) <= set(json.loads(json.dumps(srpo_rounds.parameters.properties)))
