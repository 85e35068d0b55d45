"""Shared servers of MLflow and Prefect: two clones of a project and another project run flows, killed on the way."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from srpo.rounds import Round
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking.sync import sync_campaign
from tests.support.campaign import build_campaign, write_evaluation, write_training
from tests.support.servers import free_port, mlflow_server, prefect_server
from tests.tracking.test_sync import params_of, runs_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REPO = Path(__file__).parents[2]
KILLS = 2
STEPS = {"first": 30, "second": 30, "third": 35}
# `srpo train 001` without a model: the same files and curve at each run
TRAIN = """#!{python}
import os, sys, time
from pathlib import Path
from srpo.config.loader import load_params
from srpo.rounds import Round
from srpo.tracking.live import live
from srpo.tracking.sync import sync_round
from tests.support.campaign import write_training
assert sys.argv[1:] == ["train", "001"]
params, root = load_params(), Path.cwd()
rows = write_training(params, root, "001", steps={steps})
round = Round.of(params, root, "001")
with live(round) as log_step:
    Path("training.pid").write_text(str(os.getpid()))
    for row in rows:
        log_step({{name: value for name, value in row.items() if name != "step"}}, int(row["step"]))
        time.sleep(0.05)
assert sync_round(round)
"""


def make(root: Path, uri: str, identity: str, shift: float = 0.0) -> Path:
    params = build_campaign(root, size=8)
    raw = params.model_dump()
    raw["tracking"]["uri"] = uri
    write_json(root / "params.yaml", raw)
    (root / ".srpo-project").write_text(identity)
    write_training(params, root, "001", steps=STEPS[root.name])
    if shift:
        write_evaluation(params, root, "001", shift=shift)
    report(Round.of(params_of(root), root, "001"))
    shutil.copy(REPO / "dvc.yaml", root)
    (root / "dvc.lock").unlink()  # it lacks what only DVC knows
    (root / "bin").mkdir()
    (root / "bin" / "srpo").write_text(TRAIN.format(python=sys.executable, steps=STEPS[root.name]))
    (root / "bin" / "srpo").chmod(0o755)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root, check=True)
    return root


def start(root: Path, prefect: str) -> subprocess.Popen:
    """Train round 001 and track the campaign by the flow."""
    (root / "training.pid").unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "PREFECT_API_URL": prefect,
        "PREFECT_HOME": str(root / "prefect"),
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2",
    }
    command = [sys.executable, "-m", "flows.rounds", "--round", "001", "--stage", "train", "--force"]
    with (root / "flow.log").open("w") as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)


def wait_for_training(root: Path, flow: subprocess.Popen) -> None:
    while not (root / "training.pid").exists():
        assert flow.poll() is None, (root / "flow.log").read_text()[-3000:]
        time.sleep(0.1)


def kill(root: Path, flow: subprocess.Popen) -> None:
    """Kill the flow, and the stage with the DVC that started it."""
    flow.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(int((root / "training.pid").read_text())), signal.SIGKILL)
    flow.wait()


def points_of(client: MlflowClient) -> dict[str, Counter]:
    """Return how often each point (name, step, value, time) is there, by run."""
    return {
        run.info.run_id: Counter(
            (name, point.step, point.value, point.timestamp if name.startswith("system/") else None)
            for name in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, name)
        )
        for run in runs_of(client)
    }


def flow_runs(prefect: str) -> list[dict]:
    return httpx.post(f"{prefect}/flow_runs/filter", json={"sort": "START_TIME_ASC"}, trust_env=False).json()


def test_nothing_is_lost_or_there_twice(tmp_path: Path) -> None:
    port, other_port, chance = free_port(), free_port(), random.Random(5)
    uri, prefect = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{other_port}/api"
    first = make(tmp_path / "first", uri, "first-1")
    second = shutil.copytree(first, tmp_path / "second")
    third = make(tmp_path / "third", uri, "third-3", shift=0.1)
    roots = (first, second, third)
    client, seen = MlflowClient(tracking_uri=uri), {}
    with (
        mlflow_server(tmp_path, port, f"sqlite:///{tmp_path / 'server.db'}"),
        prefect_server(tmp_path, other_port, PREFECT_HOME=str(tmp_path / "prefect")),
    ):
        # all three train at once, while the slots of killed ones are still taken
        limit = {"name": "gpu", "limit": 3 * (KILLS + 1)}
        httpx.post(f"{prefect}/v2/concurrency_limits/", json=limit, trust_env=False).raise_for_status()
        for _ in range(KILLS):
            flows = {root: start(root, prefect) for root in roots}
            for root, flow in flows.items():
                wait_for_training(root, flow)
            time.sleep(chance.uniform(0.5, 2))
            for root, flow in flows.items():
                kill(root, flow)
            for run, points in points_of(client).items():
                assert not seen.get(run, Counter()) - points, "a point is gone"
                seen[run] = points
        flows = {root: start(root, prefect) for root in roots}
        for root, flow in flows.items():
            assert flow.wait(timeout=1800) == 0, (root / "flow.log").read_text()[-3000:]
        assert sync_campaign(params_of(first), first)
        after = points_of(client)
        assert not [run for run, points in seen.items() if points - after[run]], "a point is gone"
        assert all(count == 1 for points in after.values() for count in points.values()), "a point is there twice"
        runs = runs_of(client)
        for root, project in ((first, "first-1"), (third, "third-3")):
            mine = [run for run in runs if run.data.tags["srpo.project"] == project]
            assert len([run for run in mine if run.data.tags["srpo.kind"] == "campaign"]) == 1
            (current,) = [
                run
                for run in mine
                if run.data.tags.get("srpo.round") == "001" and "true" in run.data.tags.get("srpo.current", "")
            ]
            assert current.info.status == "FINISHED" and "fid" in current.data.metrics
            losses = client.get_metric_history(current.info.run_id, "train/loss")
            assert sorted(point.step for point in losses) == list(range(1, STEPS[root.name] + 1))
        ended = flow_runs(prefect)
        assert Counter(run["name"] for run in ended) == {
            "srpo-rounds-first-1": 2 * (KILLS + 1),
            "srpo-rounds-third-3": KILLS + 1,
        }
        assert sum(run["state_type"] == "COMPLETED" for run in ended) == 3
        artifacts = httpx.post(f"{prefect}/artifacts/latest/filter", json={}, trust_env=False).json()
        assert {item["key"] for item in artifacts} == {"srpo-first-1-progress", "srpo-third-3-progress"}
