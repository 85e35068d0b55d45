"""`srpo init`: a project folder of its own, from a preset."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from srpo.errors import UserError
from srpo.runtime.extras import require
from srpo.storage.project import IDENTITY_FILE, project_identity

PROJECT = Path(__file__).parent / "project"
CLONE = Path(__file__).parents[2]
# a wheel holds these in `project`, by names that no tool there takes for its own; see pyproject.toml
AT_ROOT = {"pipeline.yaml": "dvc.yaml", "prefect.yaml": "prefect.yaml", "gitignore": ".gitignore", "presets": "presets"}
TINY = "tiny"


def presets() -> list[str]:
    """The names that `--preset` takes."""
    return sorted(path.stem for path in _template("presets").glob("*.yaml"))


def init_project(folder: Path, preset: str) -> list[str]:
    """Write params.yaml, dvc.yaml, prefect.yaml, data and a README under `folder`; make it a Git and DVC repository.

    The tiny preset's data is copied from the clone that this code runs in.

    Returns:
        The files and folders written, relative to `folder`.

    Raises:
        UserError: DVC is not installed, no such preset, one of the files is there already, or the data is not at hand;
            nothing is written.
    """
    require("dvc", "`srpo init`")
    if preset not in presets():
        raise UserError(f"--preset: there is no {preset!r}; choose one of {', '.join(presets())}")
    plan = {
        "params.yaml": _template("presets") / f"{preset}.yaml",
        "dvc.yaml": _template("pipeline.yaml"),
        "prefect.yaml": _template("prefect.yaml"),
        ".gitignore": _template("gitignore"),
    }
    examples = {"data/prompts": PROJECT / "prompts", "README.md": PROJECT / "README.md"}
    plan |= _tiny_data() if preset == TINY else examples
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    for name in plan:
        if (folder / name).exists():
            raise UserError(f"{folder / name}: is there already and init overwrites nothing; name another folder")
    for name, source in plan.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    _make_repositories(folder)
    if preset == TINY:
        _run(folder, sys.executable, "-m", "dvc", "remote", "add", "-q", "assets", "assets")
    project_identity(folder)
    return [*plan, IDENTITY_FILE]


def next_steps(preset: str) -> str:
    """What to do in a new project, one line."""
    if preset == TINY:
        return "dvc pull --remote assets data.dvc, then python -m flows.rounds"
    return "README.md has the steps: your prompts and reference pictures into data/, a remote, srpo check, dvc repro"


def _template(name: str) -> Path:
    packaged = PROJECT / name
    return packaged if packaged.exists() else CLONE / AT_ROOT[name]


def _tiny_data() -> dict[str, Path]:
    if not (CLONE / "data.dvc").is_file() or not (CLONE / "assets").is_dir():
        raise UserError(
            "--preset tiny: its models and pictures come with the source repository and not with the package;"
            " clone that and run `make demo`, or take --preset sdxl"
        )
    return {"data.dvc": CLONE / "data.dvc", "assets": CLONE / "assets"}


def _make_repositories(folder: Path) -> None:
    git = shutil.which("git")
    top = _git_top(folder) if git else None
    if git and top is None:
        _run(folder, git, "init", "-q")
        top = folder.resolve()
    if not (folder / ".dvc").exists():
        # DVC keeps to one repository for each of Git's unless told otherwise
        kind = ["--no-scm"] if top is None else [] if top == folder.resolve() else ["--subdir"]
        _run(folder, sys.executable, "-m", "dvc", "init", "-q", *kind)


def _git_top(folder: Path) -> Path | None:
    found = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=folder, capture_output=True, text=True)
    return Path(found.stdout.strip()).resolve() if found.returncode == 0 else None


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{folder}: `{Path(command[0]).name} {' '.join(command[1:4])}` failed: {words:.200}")
