"""What runners exchange through Git: entries of dvc.lock, by two clones of one repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import git_sync
from srpo.errors import UserError
from srpo.lineage.dvc_lock import read_dvc_lock

REPO = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with the project's dvc.yaml and params.yaml, and no dvc.lock yet."""
    folder = tmp_path_factory.mktemp("origin")
    first = folder / "first"
    subprocess.run(["git", "init", "-q", "-b", "main", str(first)], check=True)
    for file in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(REPO / file, first)
    (first / ".srpo-project").write_text("shared-1\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True, cwd=first)
    git(first, "add", ".")
    git(first, "commit", "-qm", "first")
    subprocess.run(["git", "clone", "-q", "--bare", str(first), str(folder / "origin")], check=True)
    return folder / "origin"


@pytest.fixture
def clones(origin: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(origin, tmp_path / "origin")
    for name in ("a", "b"):
        subprocess.run(["git", "clone", "-q", str(tmp_path / "origin"), str(tmp_path / name)], check=True)
    return tmp_path / "a", tmp_path / "b"


def note(folder: Path, **entries: str) -> None:
    """Add entries to a clone's dvc.lock, as `dvc repro` does."""
    path = folder / "dvc.lock"
    lock = YAML(typ="safe").load(path) if path.exists() else {"schema": "2.0", "stages": {}}
    lock["stages"] |= {stage: {"cmd": command} for stage, command in entries.items()}
    YAML(typ="safe").dump(lock, path)


def upstream_entries(folder: Path) -> dict[str, str]:
    git(folder, "fetch", "-q")
    text = git(folder, "show", "origin/main:dvc.lock")
    return {stage: entry["cmd"] for stage, entry in YAML(typ="safe").load(text)["stages"].items()}


def test_entries_are_pushed_and_fast_forwarded(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = clones
    note(a, generate="of a", score="not yet pushed")
    monkeypatch.chdir(a)
    assert git_sync.push_lock_entry("generate") is True
    assert git_sync.push_lock_entry("generate") is False
    note(b, train="of b")
    monkeypatch.chdir(b)
    git_sync.push_lock_entry("train")
    assert upstream_entries(b) == {"generate": "of a", "train": "of b"}
    assert git(b, "rev-list", "--count", "HEAD") == "1\n", "the clone's own branch moved under running stages"

    git_sync.fast_forward()
    assert git(b, "status", "--porcelain") == "" and git(b, "diff", "HEAD", "origin/main") == ""
    monkeypatch.chdir(a)
    git_sync.fast_forward()
    assert set(read_dvc_lock(Path())) == {"generate", "score", "train"}
    assert git(a, "status", "--porcelain") == " M dvc.lock\n", "the entry that is only here"
    assert git(a, "log", "-1", "--name-only", "--format=%s") == "dvc.lock: train\n\ndvc.lock\n"


def test_concurrent_pushes(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = clones
    code = "import sys; from flows import git_sync\nfor stage in sys.argv[1:]: git_sync.push_lock_entry(stage)"
    runs = []
    for name, folder in (("a", a), ("b", b)):
        stages = [f"{name}{number}" for number in range(4)]
        note(folder, **dict.fromkeys(stages, name))
        monkeypatch.setenv("PYTHONPATH", str(REPO))
        runs.append(subprocess.Popen([sys.executable, "-c", code, *stages], cwd=folder))
    assert [run.wait(120) for run in runs] == [0, 0]
    assert set(upstream_entries(a)) == {f"{name}{number}" for name in "ab" for number in range(4)}


def test_two_threads_of_one_clone_push(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = clones
    note(a, one="1", two="2")
    monkeypatch.chdir(a)
    threads = [threading.Thread(target=git_sync.push_lock_entry, args=[stage]) for stage in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(upstream_entries(a)) == {"one", "two"}


@pytest.mark.parametrize(
    ("file", "commit", "message"),
    [
        ("params.yaml", False, r"params\.yaml has uncommitted changes"),
        ("params.yaml", True, "this branch has commits that are not in origin/main"),
    ],
)
def test_unpushed_changes_are_an_error(clones, monkeypatch, file: str, commit: bool, message: str) -> None:
    a, _ = clones
    (a / file).write_text((a / file).read_text() + "# mine\n")
    if commit:
        git(a, "commit", "-qam", "mine")
    monkeypatch.chdir(a)
    with pytest.raises(UserError, match=message):
        git_sync.fast_forward()


def test_identity_outside_git_is_an_error(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = clones
    git(a, "rm", "-q", "--cached", ".srpo-project")
    git(a, "commit", "-qm", "no identity")
    git(a, "push", "-q")
    monkeypatch.chdir(a)
    with pytest.raises(UserError, match=r"\.srpo-project is not in Git, so each runner would be its own project"):
        git_sync.fast_forward()


def test_rejected_push(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = clones
    hook = a.parent / "origin" / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho protected >&2; exit 1\n")
    hook.chmod(0o755)
    note(a, train="of a")
    monkeypatch.chdir(a)
    with pytest.raises(UserError, match=r"dvc\.lock: train could not be pushed to origin/main"):
        git_sync.push_lock_entry("train")


def test_inputs_of_train(clones, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = clones
    monkeypatch.chdir(a)
    assert git_sync.inputs("train@002") == ["rounds/002/winners", "rounds/001/adapter"]
