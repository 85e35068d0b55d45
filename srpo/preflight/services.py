"""Checks of Git, DVC and its remote, and the MLflow server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from srpo.errors import UserError, one_line, without_secrets
from srpo.lineage.dvc_lock import LOCK_FILE, read_dvc_lock
from srpo.lineage.lock_merge import COMMAND, DRIVER
from srpo.preflight import CheckResult
from srpo.runtime.extras import missing
from srpo.storage.conflicts import check_no_conflict
from srpo.storage.git import git

if TYPE_CHECKING:
    from dvc.repo import Repo

NOT_INSTALLED = 127  # status of `git`
TIMEOUT_SECONDS = 15.0  # generous: a loaded server may be slow to answer


def check_repositories(root: Path) -> list[CheckResult]:
    """Check that the project is under version control by Git and DVC, and that the DVC remote is writable."""
    results = [check_git(root), check_pipeline_files(root)]
    if line := missing("dvc"):
        return [*results, CheckResult("dvc", "fail", f"a project {line}")]
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        return [*results, CheckResult("dvc", "fail", "not a DVC repository; create one with `srpo init` or `dvc init`")]
    with repo:
        data = CheckResult("dvc", "ok", "data/ is tracked")
        if not (root / "data.dvc").is_file():
            data = CheckResult("dvc", "warn", "data/ is not tracked, so no commit can restore it; run `dvc add data`")
        return [*results, data, check_remote(repo)]


def check_git(root: Path) -> CheckResult:
    """Check that the project is in a Git repository without uncommitted changes, with the merge driver of dvc.lock."""
    status = git("status", "--porcelain", root=root)
    if status.returncode != 0:
        reason = "not installed" if status.returncode == NOT_INSTALLED else "no Git repository"
        return CheckResult("git", "warn", f"{reason}; dvc.lock is not under version control")
    attribute = git("check-attr", "merge", LOCK_FILE, root=root).stdout
    if attribute.rstrip().endswith(DRIVER) and not git("config", f"merge.{DRIVER}.driver", root=root).stdout:
        text = f"this clone has no merge driver for dvc.lock; `git config merge.{DRIVER}.driver '{COMMAND}'`"
        return CheckResult("git", "warn", text)
    if changed := len(status.stdout.splitlines()):
        return CheckResult("git", "warn", f"{changed} uncommitted files; commit them, so that rounds record their code")
    return CheckResult("git", "ok", "all files committed")


def check_pipeline_files(root: Path) -> CheckResult:
    """Check that a merge has left no conflict in dvc.yaml or dvc.lock."""
    try:
        pipeline = root / "dvc.yaml"
        if pipeline.exists():
            text = pipeline.read_text(encoding="utf-8", errors="replace")
            check_no_conflict("dvc.yaml", text, "remove the markers and `git add dvc.yaml`")
        stages = read_dvc_lock(root)
    except UserError as error:
        return CheckResult(LOCK_FILE, "fail", str(error))
    return CheckResult(LOCK_FILE, "ok", f"{len(stages)} stages recorded")


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
