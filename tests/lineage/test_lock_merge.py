"""dvc.lock of two branches, merged by Git itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo import cli
from srpo.errors import UserError
from srpo.lineage.dvc_lock import read_dvc_lock
from srpo.lineage.lock_merge import COMMAND, DRIVER, dump_dvc_lock, merge_stages
from srpo.scaffold.init import init_project

REPO = Path(__file__).parents[2]


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def git(root: Path, *arguments: str) -> None:
    done = run(root, "git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def record(root: Path, **entries: str) -> None:
    """Add the entries of stages (`train_001`) to dvc.lock, as DVC writes them, and commit."""
    stages = read_dvc_lock(root)
    for name, md5 in entries.items():
        stage, _, key = name.partition("_")
        out = {"path": f"rounds/{key}/{stage}", "hash": "md5", "md5": md5 * 32, "size": 123, "nfiles": 2}
        stages[f"{stage}@{key}"] = {"cmd": f"srpo {stage} {key}", "outs": [out]}
    (root / "dvc.lock").write_bytes(dump_dvc_lock(stages))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "rounds")


@pytest.fixture
def branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new project; on `other` round 002b has run and 001 was generated again, on `main` 002 has run."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    init_project(root, "sdxl")
    record(root, generate_001="1", report_001="2")
    git(root, "checkout", "-qb", "other")
    record(root, generate_002b="3", generate_001="4", train_002b="5")
    git(root, "checkout", "-q", "main")
    record(root, generate_002="6", train_002="7")
    monkeypatch.chdir(root)
    return root


def hashes(root: Path) -> dict[str, str]:
    return {stage: entry["outs"][0]["md5"][0] for stage, entry in read_dvc_lock(root).items()}


MERGED = {
    "generate@001": "4", "report@001": "2", "generate@002": "6", "train@002": "7", "generate@002b": "3",
    "train@002b": "5",
}  # fmt: skip


def test_git_merges_by_entry(branches: Path) -> None:
    assert run(branches, "git", "config", f"merge.{DRIVER}.driver").stdout.strip() == COMMAND
    command = COMMAND.replace("srpo", f"{shlex.quote(sys.executable)} -m srpo", 1)  # no environment is activated
    git(branches, "config", f"merge.{DRIVER}.driver", command)
    git(branches, "merge", "-q", "other")
    assert hashes(branches) == MERGED
    assert run(branches, "git", "status", "--porcelain").stdout == ""


def test_conflict_is_one_line_and_resolved(branches: Path, capfd: pytest.CaptureFixture) -> None:
    git(branches, "config", "--remove-section", f"merge.{DRIVER}")  # a clone without the driver
    assert run(branches, "git", "merge", "-q", "other").returncode == 1
    assert "<<<<<<<" in (branches / "dvc.lock").read_text()
    with pytest.raises(UserError, match=r"^dvc\.lock:\d+: .*; run `srpo lock merge`, then `git add dvc\.lock`$"):
        read_dvc_lock(branches)
    assert cli.run(["check"]) == 2
    assert "fail  dvc.lock " in capfd.readouterr().out
    assert cli.run(["lock", "merge"]) == 0
    assert hashes(branches) == MERGED
    git(branches, "add", "dvc.lock")
    git(branches, "commit", "-qm", "merged")
    assert cli.run(["lock", "merge"]) == 2
    assert "Git has no conflict in this file" in capfd.readouterr().err


def test_conflict_in_params_is_one_line(branches: Path, capfd: pytest.CaptureFixture) -> None:
    params = branches / "params.yaml"
    params.write_text(
        params.read_text().replace("seed: 0\n", "<<<<<<< HEAD\nseed: 0\n=======\nseed: 1\n>>>>>>> other\n")
    )
    assert cli.run(["check"]) == 2
    error = capfd.readouterr().err.strip()
    assert "params.yaml:" in error and "unresolved conflict of a Git merge" in error and "\n" not in error


def test_damaged_lock_is_one_line(tmp_path: Path) -> None:
    for text in ("- a list", "stages: [1", "stages: 3"):
        (tmp_path / "dvc.lock").write_text(text)
        with pytest.raises(UserError, match=r"^dvc\.lock: damaged; restore it"):
            read_dvc_lock(tmp_path)


STAGES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2))


@given(base=STAGES, ours=STAGES, theirs=STAGES)
def test_merge_stages(base: dict, ours: dict, theirs: dict) -> None:
    merged = merge_stages(base, ours, theirs)
    for stage in base | ours | theirs:
        versions = {side.get(stage) for side in (ours, theirs)}
        changed = versions - {base.get(stage)}
        if not changed:
            assert merged.get(stage) == base.get(stage)
        elif len(changed) == 1:  # by one side, or by both alike; a deletion yields to a change
            assert merged.get(stage) == changed.pop()
        else:
            assert merged[stage] == (ours[stage] if stage in ours else theirs[stage])
