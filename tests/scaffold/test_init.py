"""`srpo init`: a new project folder that DVC reads, and nothing overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from srpo import cli
from srpo.config.loader import load_params
from srpo.data.prompts import check_disjoint, load_prompts
from srpo.rewards.loading import load_reward
from srpo.scaffold import init

REPO = Path(__file__).parents[2]
ORIGINAL = YAML(typ="safe").load(REPO / "prefect.yaml")


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and not {".git", ".dvc"} & set(path.parts))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_new_project(tmp_path: Path) -> None:
    root = tmp_path / "campaign"
    assert cli.run(["init", str(root)]) == 0
    assert (root / "params.yaml").read_text() == (REPO / "presets" / "sdxl.yaml").read_text()
    assert (root / "dvc.yaml").read_bytes() == (REPO / "dvc.yaml").read_bytes()
    params = load_params(root / "params.yaml")
    train, held_out = (load_prompts(root / path) for path in (params.prompts.train, params.prompts.eval))
    check_disjoint(train, held_out)
    assert (root / ".git").is_dir()
    assert 'type = "reflink,hardlink,symlink"' in (root / ".dvc" / "config").read_text()
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=root, capture_output=True, text=True
    )
    assert {"base", "generate@001", "report@003"} <= set(listed.stdout.split()), listed.stderr
    assert (root / ".srpo-project").read_text().startswith("campaign-")


def test_deployments_are_named_by_project(tmp_path: Path) -> None:
    names = []
    for folder in ("birds", "trains"):
        assert cli.run(["init", str(tmp_path / folder)]) == 0
        identity = (tmp_path / folder / ".srpo-project").read_text().strip()
        assert identity.startswith(f"{folder}-")
        deployments = YAML(typ="safe").load(tmp_path / folder / "prefect.yaml")["deployments"]
        names += [deployment["name"] for deployment in deployments]
        assert f"{identity}-local" in names
        for original, deployment in zip(ORIGINAL["deployments"], deployments, strict=True):
            assert deployment == original | {"name": f"{identity}-{original['name']}"}
    assert len(set(names)) == 2 * len(ORIGINAL["deployments"])


@pytest.mark.parametrize("name", ["params.yaml", "data/prompts/eval.jsonl", ".gitignore"])
def test_existing_files_stay(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert cli.run(["init", str(tmp_path)]) == 2
    error = capfd.readouterr().err.strip()
    assert "exists already, and init overwrites nothing" in error and "\n" not in error
    assert files(tmp_path) == {name: b"mine"}


def test_the_tiny_world_needs_a_clone(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch) -> None:
    shutil.copytree(REPO / "presets", tmp_path / "elsewhere" / "presets")
    for name in ("dvc.yaml", "prefect.yaml", ".gitignore"):
        shutil.copy(REPO / name, tmp_path / "elsewhere")
    monkeypatch.setattr(init, "CLONE", tmp_path / "elsewhere")
    assert cli.run(["init", "--preset", "tiny", str(tmp_path / "new")]) == 2
    error = capfd.readouterr().err.strip()
    assert "--preset tiny: " in error and "clone that and run `make demo`" in error and "\n" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_project_of_the_tiny_world_pulls_its_data(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    assert cli.run(["init", "--preset", "tiny", str(root)]) == 0
    command = [sys.executable, "-m", "dvc", "pull", "-q", "--remote", "assets", "data.dvc"]
    subprocess.run(command, cwd=root, check=True)
    for name in ("prompts/train.jsonl", "base/model_index.json"):
        assert (root / "data" / name).is_file()
    judge = load_params(root / "params.yaml").rewards["accuracy"]
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert load_reward(judge, root, torch.device("cpu")).score(pixels, ["a red circle"]).tolist() == [0.0]


def test_without_git(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run(["init", str(tmp_path / "new")]) == 0
    assert "no_scm = True" in (tmp_path / "new" / ".dvc" / "config").read_text()
    assert not (tmp_path / "new" / ".git").exists()


def test_existing_repository_is_used(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert cli.run(["init", str(tmp_path / "inside")]) == 0
    assert not (tmp_path / "inside" / ".git").exists() and (tmp_path / "inside" / ".dvc").is_dir()


def test_an_unknown_preset_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert cli.run(["init", "--preset", "flux", str(tmp_path / "new")]) == 2
    assert "choose one of sdxl, tiny" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
