"""`srpo init`: a new project folder from a preset."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from srpo.errors import UserError
from srpo.lineage.lock_merge import ATTRIBUTE, COMMAND, DRIVER
from srpo.runtime.extras import require
from srpo.storage.git import git
from srpo.storage.project import IDENTITY_FILE, project_identity

PROJECT = Path(__file__).parent / "project"
CLONE = Path(__file__).parents[2]
# a wheel has these files in `project`, by names that no tool there takes for its own; see pyproject.toml
AT_ROOT = {"pipeline.yaml": "dvc.yaml", "prefect.yaml": "prefect.yaml", "gitignore": ".gitignore", "presets": "presets"}
TINY = "tiny"
# How DVC puts files of its cache into the workspace, the first that the disk can. Its default would copy where the disk
# has no reflinks: every image twice. Links forbid to change a tracked file in place, which would change the cache, so
# DVC makes it read-only; stages always replace their outputs.
CACHE_TYPE = "reflink,hardlink,symlink"
DEPLOYMENT_NAME = re.compile(r"(?<=^  - name: )\w+$|(?<=--name )\w+", re.MULTILINE)


def presets() -> list[str]:
    """Return the values of `--preset`."""
    return sorted(path.stem for path in _template("presets").glob("*.yaml"))


def init_project(folder: Path, preset: str) -> list[str]:
    """Write params.yaml, dvc.yaml, prefect.yaml, data and a README under `folder`; make it a Git and DVC repository.

    The data of the tiny world is copied from the clone that this code runs in, and `demo/`, which has its exact judge.

    Returns:
        The files and folders written, relative to `folder`.

    Raises:
        UserError: DVC is not installed, no such preset, a file exists already, or the preset's data is missing;
            nothing is written.
    """
    require("dvc", "`srpo init`")
    if preset not in presets():
        raise UserError(f"--preset: no preset {preset!r}; choose one of {', '.join(presets())}")
    plan = {
        "params.yaml": _template("presets") / f"{preset}.yaml",
        "dvc.yaml": _template("pipeline.yaml"),
        "prefect.yaml": _template("prefect.yaml"),
        ".gitignore": _template("gitignore"),
    }
    examples = {"data/prompts": PROJECT / "prompts", "README.md": PROJECT / "README.md"}
    plan |= _tiny_world() if preset == TINY else examples
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    for name in plan:
        if (folder / name).exists():
            raise UserError(f"{folder / name}: exists already, and init overwrites nothing; name another folder")
    for name, source in plan.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    _name_deployments(folder)
    _make_repositories(folder)
    _install_merge_driver(folder)
    if preset == TINY:
        _run(folder, sys.executable, "-m", "dvc", "remote", "add", "-q", "assets", "assets")
    project_identity(folder)
    return [*plan, IDENTITY_FILE, ".gitattributes"]


def next_steps(preset: str) -> str:
    """Return the next steps in a new project as one line."""
    if preset == TINY:
        return "dvc pull --remote assets data.dvc, then python -m flows.rounds --warm"
    return "see README.md: add prompts and reference images to data/, add a remote, run srpo check and dvc repro"


def _template(name: str) -> Path:
    packaged = PROJECT / name
    return packaged if packaged.exists() else CLONE / AT_ROOT[name]


def _tiny_world() -> dict[str, Path]:
    plan = {name: CLONE / name for name in ("data.dvc", "assets", "demo")}
    if not all(source.exists() for source in plan.values()):
        raise UserError(
            "--preset tiny: its models, images and exact judge are in the source repository and not in the"
            " package; clone that and run `make demo`, or use --preset sdxl"
        )
    return plan


def _name_deployments(folder: Path) -> None:
    """Put the project's identity before the names of deployments: a Prefect server has one of each name."""
    path = folder / "prefect.yaml"
    identity = project_identity(folder)
    path.write_text(DEPLOYMENT_NAME.sub(rf"{identity}-\g<0>", path.read_text(encoding="utf-8")), encoding="utf-8")


def _make_repositories(folder: Path) -> None:
    top = _git_top(folder)
    if top is None and git("init", "-q", root=folder).returncode == 0:
        top = folder.resolve()
    if not (folder / ".dvc").exists():
        # in a subfolder of a Git repository DVC needs an option
        kind = ["--no-scm"] if top is None else [] if top == folder.resolve() else ["--subdir"]
        _run(folder, sys.executable, "-m", "dvc", "init", "-q", *kind)
        _run(folder, sys.executable, "-m", "dvc", "config", "cache.type", CACHE_TYPE)


def _install_merge_driver(folder: Path) -> None:
    """Have Git merge dvc.lock by entry. The attribute is versioned; the command is a setting of each clone."""
    path = folder / ".gitattributes"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if ATTRIBUTE not in lines:
        path.write_text("\n".join([*lines, ATTRIBUTE]) + "\n", encoding="utf-8")
    git("config", f"merge.{DRIVER}.driver", COMMAND, root=folder)


def _git_top(folder: Path) -> Path | None:
    done = git("rev-parse", "--show-toplevel", root=folder)
    return Path(done.stdout.strip()).resolve() if done.returncode == 0 else None


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        message = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{folder}: `{Path(command[0]).name} {' '.join(command[1:4])}` failed: {message:.200}")
