"""The wheel, installed away from the clone: a project starts, is checked, images are scored, the flow is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files and nothing else; what it requires comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = [sys.executable, "-m", "uv"]
    # through the source archive, so that both are seen to carry the files; without a network
    subprocess.run([*uv, "build", "-q", "--no-build-isolation", "-o", str(folder / "dist"), str(REPO)], check=True)
    wheel = next((folder / "dist").glob("*.whl"))
    subprocess.run([*uv, "pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_it_holds_the_packages_alone(installed: Path) -> None:
    wheel = next((installed.parent / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"srpo", "flows"}
    tracked = subprocess.run(
        ["git", "ls-files", "srpo", "flows"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) <= set(names)
    archive = next((installed.parent / "dist").glob("*.tar.gz"))
    assert archive.stat().st_size < 1_000_000


def test_a_project_starts_and_is_checked(installed: Path, tmp_path: Path) -> None:
    place = run(installed, tmp_path, "-c", "import srpo, flows; print(srpo.__file__, flows.__file__, srpo.__version__)")
    assert place.stdout.count(str(installed)) == 2, place.stderr
    done = run(installed, tmp_path, "-m", "srpo", "init", "project")
    assert done.returncode == 0, done.stderr
    project = tmp_path / "project"
    originals = {"params.yaml": "presets/sdxl.yaml"} | {name: name for name in ("dvc.yaml", ".gitignore")}
    for name, original in originals.items():
        assert (project / name).read_bytes() == (REPO / original).read_bytes()
    checked = run(installed, project, "-m", "srpo", "check")
    assert checked.returncode == 2 and "Traceback" not in checked.stderr
    assert "params.yaml" in checked.stdout and "prompts.train" in checked.stdout
    refused = run(installed, tmp_path, "-m", "srpo", "init", "--preset", "tiny", "tiny")
    assert refused.returncode == 2 and "clone" in refused.stderr


def test_images_are_scored(installed: Path, shared_world: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(shared_world / "data" / "reward", tmp_path / "clip")
    (tmp_path / "images").mkdir()
    for color in ("red", "green"):
        Image.new("RGB", (32, 32), color).save(tmp_path / "images" / f"{color}.png")
    words = ["score-images", "images", "--reward", "clip=clip", "--prompt", "a red circle", "--out", "scores.parquet"]
    done = run(installed, tmp_path, "-m", "srpo", *words)
    assert done.returncode == 0, done.stderr
    import polars as pl

    assert pl.read_parquet(tmp_path / "scores.parquet").height == 2


def test_the_flow_is_a_module(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "flows.rounds", "--help")
    assert done.returncode == 0 and "--force" in done.stdout, done.stderr
