"""DVC experiments in a real project: each is a run of its own in MLflow, wherever DVC ran it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support.world import REPO
from tests.tracking.test_sync import runs_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CURVE = "rounds/001/training.csv"
NAMES = ("in-place", "in-a-copy", "queued")


def run(root: Path, *command: str) -> str:
    identity = {f"GIT_{who}_{what}": "srpo" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | identity | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture
def trained(world: Path) -> Path:
    """A committed project whose round 001 is trained."""
    run(world, "git", "init", "-q", "-b", "main")
    dvc(world, "init", "-q")
    shutil.copy(REPO / ".gitignore", world)
    (world / ".srpo-project").write_text("world-1\n")
    dvc(world, "add", "-q", "data")
    dvc(world, "repro", "-q", "train@001")
    run(world, "git", "add", ".")
    run(world, "git", "commit", "-qm", "Round 001")
    return world


def trainings(root: Path) -> dict[str, Run]:
    """The runs of round 001, by the name of their DVC experiment."""
    found = runs_of(MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db"))
    return {
        run.data.tags.get("srpo.dvc_experiment", ""): run for run in found if run.data.tags.get("srpo.round") == "001"
    }


def test_experiments_are_runs_of_their_own(trained: Path) -> None:
    first = trainings(trained)[""].info.run_id
    dvc(trained, "exp", "run", "-q", "-n", "in-place", "-S", "train.rank=4", "train@001")
    dvc(trained, "exp", "run", "-q", "-n", "in-a-copy", "--temp", "-S", "train.steps=4", "train@001")
    dvc(trained, "exp", "run", "-q", "-n", "queued", "--queue", "-S", "train.steps=5", "train@001")
    dvc(trained, "exp", "run", "-q", "--run-all")

    runs = trainings(trained)
    assert runs[""].info.run_id == first and set(runs) == {"", *NAMES}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    shown = {name: (run.data.params["train.rank"], run.data.params["train.steps"]) for name, run in runs.items()}
    assert shown == {"": ("2", "3"), "in-place": ("4", "3"), "in-a-copy": ("4", "4"), "queued": ("4", "5")}
    assert [name for name, run in runs.items() if run.data.tags.get("srpo.current") == "true"] == ["in-place"]
    assert not list((trained / ".dvc" / "tmp").rglob("mlflow.db")), "records in a temporary copy"

    table = json.loads(dvc(trained, "exp", "show", "--json"))
    there = {name for row in table for group in row.get("experiments") or () for name in [group["name"]]}
    assert there == set(NAMES)
    changed = json.loads(dvc(trained, "params", "diff", "--json", "in-a-copy", "queued"))["params.yaml"]
    assert (changed["train.steps"]["old"], changed["train.steps"]["new"]) == (4, 5)
    plots = json.loads(dvc(trained, "plots", "diff", "--json", "in-a-copy", "queued", "--targets", CURVE))
    points = plots["data"][CURVE][0]["content"]["data"]["values"]
    assert Counter(point["rev"] for point in points) == {"in-a-copy": 4, "queued": 5}

    run(trained, "git", "tag", "-a", "-m", "the first", "adapter-001@v1.0.0")  # as `gto register adapter-001` does
    dvc(trained, "artifacts", "get", ".", "adapter-001", "-o", "got")
    assert (trained / "got" / "lineage.json").is_file() and list((trained / "got").glob("*.safetensors"))
