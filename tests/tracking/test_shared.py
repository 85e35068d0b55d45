"""A shared MLflow server: two clones of a project and another project log side by side, and are killed on the way."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from srpo.rounds import Round
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking.sync import sync_campaign
from tests.support.campaign import build_campaign, write_evaluation, write_training
from tests.support.servers import free_port, mlflow_server
from tests.tracking.test_sync import params_of, runs_of

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[2]
KILLS = 4
# trains round 001 again with the curve of its training.csv, and tracks, until it is killed or has done both
WORK = """
import csv, sys, time
from pathlib import Path
from srpo.config.loader import load_params
from srpo.rounds import Round
from srpo.tracking.live import live
from srpo.tracking.sync import sync_campaign, sync_round
root = Path.cwd()
round = Round.of(load_params(), root, "001")
with round.files.training.open() as file:
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
with live(round) as curve:
    print("training", flush=True)
    for row in rows:
        curve.log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
        time.sleep(0.05)
assert sync_round(round) and sync_campaign(load_params(), root)
"""


def make(root: Path, uri: str, identity: str, shift: float = 0.0) -> Path:
    params = build_campaign(root, size=8)
    raw = params.model_dump()
    raw["tracking"]["uri"] = uri
    write_json(root / "params.yaml", raw)
    (root / ".srpo-project").write_text(identity)
    if shift:
        write_training(params, root, "001", steps=35)
        write_evaluation(params, root, "001", shift=shift)
    report(Round.of(params_of(root), root, "001"))
    return root


def start(root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
    command = [sys.executable, "-c", WORK]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


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


def test_nothing_is_lost_or_there_twice(tmp_path: Path) -> None:
    port, chance = free_port(), random.Random(5)
    uri = f"http://127.0.0.1:{port}"
    first = make(tmp_path / "first", uri, "first-1")
    second = shutil.copytree(first, tmp_path / "second")
    third = make(tmp_path / "third", uri, "third-3", shift=0.1)
    client, seen = MlflowClient(tracking_uri=uri), {}
    with mlflow_server(tmp_path, port, f"sqlite:///{tmp_path / 'server.db'}"):
        for _ in range(KILLS):
            processes = [start(root) for root in (first, second, third)]
            for process in processes:
                assert process.stdout.readline() == "training\n"
            time.sleep(chance.uniform(0.5, 4))
            for process in processes:
                process.kill()
                process.wait()
            for run, points in points_of(client).items():
                assert not seen.get(run, Counter()) - points, "a point is gone"
                seen[run] = points
        processes = [start(root) for root in (first, second, third)]
        assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
        assert sync_campaign(params_of(first), first)
        after = points_of(client)
        assert not [run for run, points in seen.items() if points - after[run]], "a point is gone"
        assert all(count == 1 for points in after.values() for count in points.values()), "a point is there twice"
        runs = runs_of(client)
        for project, steps in (("first-1", 30), ("third-3", 35)):
            mine = [run for run in runs if run.data.tags["srpo.project"] == project]
            assert len([run for run in mine if run.data.tags["srpo.kind"] == "campaign"]) == 1
            (current,) = [
                run
                for run in mine
                if run.data.tags.get("srpo.round") == "001" and "true" in run.data.tags.get("srpo.current", "")
            ]
            assert current.info.status == "FINISHED" and "fid" in current.data.metrics
            losses = client.get_metric_history(current.info.run_id, "train/loss")
            assert sorted(point.step for point in losses) == list(range(1, steps + 1))
