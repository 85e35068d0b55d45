"""Without the extras' packages: stages run, and what needs one says in a line which to install."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.campaign import build_campaign

REPO = Path(__file__).parents[2]
IMPORT_ALL = (
    "import importlib, pkgutil, srpo\n"
    "for module in pkgutil.walk_packages(srpo.__path__, 'srpo.'):\n"
    "    if module.name not in ('srpo.__main__', 'srpo.runtime.cluster', 'srpo.runtime.gang',"
    " 'srpo.runtime.ray_connection'):\n"  # those that are nothing without Ray
    "        importlib.import_module(module.name)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site-packages as `pip install srpo` leaves it: links to this environment's, but for the extras' packages."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("dvc", "mlflow", "prefect", "ray")):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    build_campaign(root, ("001",))
    return root


def run(site: Path, project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{REPO}"}
    # -S: without this environment's own site-packages
    return subprocess.run([sys.executable, "-S", *words], cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["srpo", "track"], "`srpo track` needs MLflow; pip install 'srpo[tracking]'"),
        (["srpo", "init", "new"], "`srpo init` needs DVC; pip install 'srpo[dvc]'"),
        (["srpo", "restore", "1"], "`srpo restore` needs DVC; pip install 'srpo[dvc]'"),
        (["flows.rounds"], "`flows` needs Prefect; pip install 'srpo[flows]'"),
    ],
)
def test_the_extra_is_named(site: Path, project: Path, words: list[str], line: str) -> None:
    done = run(site, project, "-m", *words)
    assert (done.returncode, done.stderr) == (2, f"srpo: error: {line}\n")
    assert not (project / "new").exists()


def test_a_stage_runs_without_mlflow(site: Path, project: Path) -> None:
    done = run(site, project, "-m", "srpo", "report", "001")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "MLflow" in line]
    assert "needs MLflow; pip install 'srpo[tracking]'" in line
    assert (project / "rounds" / "001" / "report" / "index.html").is_file()


def test_check_tells_what_is_missing(site: Path, project: Path) -> None:
    lines = run(site, project, "-m", "srpo", "check").stdout.splitlines()
    assert [line.split()[0] for line in lines if "pip install 'srpo[dvc]'" in line] == ["fail"]
    assert [line.split()[0] for line in lines if "pip install 'srpo[tracking]'" in line] == ["warn"]


@pytest.mark.slow
def test_every_module_imports(site: Path, project: Path) -> None:
    done = run(site, project, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
