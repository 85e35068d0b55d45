"""Two clones in different folders that share only Git and an S3 server: one generates and evaluates, one trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.flows.conftest import BUCKET, REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def flow(folder: Path, *stages: str) -> str:
    chosen = [word for stage in stages for word in ("--stage", stage)]
    return run(folder, sys.executable, "-m", "flows.rounds", "--round", "001", "--push", *chosen)


@pytest.fixture
def clones(world: Path, s3: str, prefect_server: str, tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """Clones `a` and `b` of a repository with the random-weight world, whose data are in the S3 remote."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "runner")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "runner@localhost")
    run(world, "git", "init", "-q", "-b", "main")
    dvc(world, "init", "-q")
    dvc(world, "remote", "add", "-q", "--default", "store", f"s3://{BUCKET}/store")
    dvc(world, "remote", "modify", "-q", "store", "endpointurl", s3)
    shutil.copy(REPO / ".gitignore", world)
    (world / ".srpo-project").write_text("shared-1\n")
    dvc(world, "add", "-q", "data")
    dvc(world, "push", "-q")
    run(world, "git", "add", ".")
    run(world, "git", "commit", "-qm", "The world")
    run(tmp_path, "git", "clone", "-q", "--bare", str(world), "origin.git")
    for name in ("a", "b"):
        run(tmp_path, "git", "clone", "-q", str(tmp_path / "origin.git"), name)
    shutil.rmtree(world)
    return tmp_path / "a", tmp_path / "b"


def objects_of(clone: Path, stage: str, path: str) -> list[Path]:
    """Where a clone's cache would hold a stage's output: its list of files, and each of them. Read from `clone`'s."""
    outs = YAML(typ="safe").load(clone / "dvc.lock")["stages"][stage]["outs"]
    digest = next(out["md5"] for out in outs if out["path"] == path)
    cache = Path(".dvc/cache/files/md5")
    listing = json.loads((clone / cache / digest[:2] / digest[2:]).read_text())
    return [cache / name[:2] / name[2:] for name in (digest, *(entry["md5"] for entry in listing))]


def test_two_runners_share_a_round(clones: tuple[Path, Path]) -> None:
    a, b = clones
    flow(a, "base", "evaluate-base", "generate", "score", "select")
    flow(b, "train")
    candidates = objects_of(a, "generate@001", "rounds/001/candidates")
    assert len(candidates) > 1 and all((a / path).exists() for path in candidates)
    assert not any((b / path).exists() for path in candidates), "the trainer pulled candidates"
    assert sorted(path.name for path in (b / "rounds" / "001").iterdir()) == ["adapter", "training.csv", "winners"]
    there = flow(a, "evaluate", "gate", "report")
    assert "evaluate@001" in there and (a / "rounds/001/report/index.html").exists()

    run(b, "git", "pull", "-q")
    for clone in (a, b):
        assert run(clone, "git", "status", "--porcelain") == ""
        # what B left to others is `deleted` there: in the remote and not in its cache. Nothing is new or missing
        words = dvc(clone, "status", "-c")
        assert "new:" not in words and "missing:" not in words, words
    assert (a / "dvc.lock").read_bytes() == (b / "dvc.lock").read_bytes()
    recorded = list(YAML(typ="safe").load(b / "dvc.lock")["stages"])  # params.yaml has rounds that did not run
    dvc(b, "pull", "-q", *recorded)
    for clone in (a, b):
        assert "in sync" in dvc(clone, "status", "-c", "data.dvc", *recorded)
