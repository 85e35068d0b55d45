"""Checks of Git, DVC and its remote, and the MLflow server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from srpo.errors import one_line, without_secrets
from srpo.preflight import CheckResult
from srpo.runtime.extras import missing

if TYPE_CHECKING:
    from dvc.repo import Repo

TIMEOUT_SECONDS = 15.0  # generous: a loaded server may be slow to answer


def check_repositories(root: Path) -> list[CheckResult]:
    """Check that the project is under version control by Git and DVC, and that the DVC remote is writable."""
    git = check_git(root)
    if line := missing("dvc"):
        return [git, CheckResult("dvc", "fail", f"a project {line}")]
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        return [git, CheckResult("dvc", "fail", "not a DVC repository; create one with `srpo init` or `dvc init`")]
    with repo:
        data = CheckResult("dvc", "ok", "data/ is tracked")
        if not (root / "data.dvc").is_file():
            data = CheckResult("dvc", "warn", "data/ is not tracked, so no commit can restore it; run `dvc add data`")
        return [git, data, check_remote(repo)]


def check_git(root: Path) -> CheckResult:
    """Check that the project is in a Git repository without uncommitted changes."""
    try:
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return CheckResult("git", "warn", "not installed; dvc.lock is not under version control")
    if status.returncode != 0:
        return CheckResult("git", "warn", "no Git repository; dvc.lock is not under version control")
    if changed := len(status.stdout.splitlines()):
        return CheckResult("git", "warn", f"{changed} uncommitted files; commit them, so that rounds record their code")
    return CheckResult("git", "ok", "all files committed")


def check_remote(repo: Repo) -> CheckResult:
    """Check that DVC's default remote is writable, by writing and deleting a small object."""
    name = repo.config["core"].get("remote")
    if not name:
        text = "no default remote: rounds are on this disk only; `dvc remote add --default store s3://bucket/path`"
        return CheckResult("dvc remote", "warn", text)
    try:
        remote = repo.cloud.get_remote()
        url = repo.config["remote"][name]["url"]
        probe = remote.fs.join(remote.path, f"srpo-check-{uuid4().hex}")
        remote.fs.makedirs(remote.path, exist_ok=True)  # a no-op on object stores
        remote.fs.pipe_file(probe, b"srpo check")
        remote.fs.rm_file(probe)
    except Exception as error:  # of DVC, of the store's client or of the operating system
        line = f"{without_secrets(one_line(error)):.160}" or type(error).__name__
        return CheckResult("dvc remote", "fail", f"not writable: {line}; correct `dvc remote` or its credentials")
    return CheckResult("dvc remote", "ok", f"{name}: {without_secrets(url)} is writable")


def check_mlflow(uri: str) -> CheckResult:
    """Check that the tracking server answers to its name and to this environment's credentials."""
    if line := missing("mlflow"):
        return CheckResult("mlflow", "warn", f"tracking {line}")
    import httpx

    shown = without_secrets(uri)
    if not uri.startswith(("http://", "https://")):
        return CheckResult("mlflow", "ok", f"{shown}: not a server")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    hints = {
        401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: "it does not accept this host name: start it with --allowed-hosts, see docs/how-to/servers.md",
    }
    try:
        response = httpx.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": 1},
            auth=(user, password) if user and password else None,
            timeout=TIMEOUT_SECONDS,
        )
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        text = f"{shown} does not answer ({type(error).__name__}); start it, see docs/how-to/servers.md"
        return CheckResult("mlflow", "fail", text)
    if response.is_success:
        return CheckResult("mlflow", "ok", f"{shown} answers")
    hint = hints.get(response.status_code, "is it the right address?")
    return CheckResult("mlflow", "fail", f"{shown} answers {response.status_code}; {hint}")
