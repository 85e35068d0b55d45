"""Exchange between runners without a shared disk: files through the DVC remote, entries of dvc.lock through Git.

A runner starts with `fast_forward`, pulls a stage's `inputs`, and calls `push_lock_entry` after each stage: a commit of
one entry of dvc.lock on top of the upstream branch, without touching the working tree, because other stages of this
clone may be running. Nothing else commits dvc.lock.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.errors import UserError
from srpo.lineage.dvc_lock import LOCK_FILE, parse_dvc_lock, read_dvc_lock
from srpo.lineage.lock_merge import dump_dvc_lock
from srpo.storage.git import git
from srpo.storage.project import IDENTITY_FILE

SOURCES = ("params.yaml", "dvc.yaml", "data.dvc", IDENTITY_FILE)  # other runners need the same
ATTEMPTS = 20
_one_at_a_time = threading.Lock()


def inputs(stage: str) -> list[str]:
    """Return the dependencies of a stage that are outputs of other stages, which a runner has to pull.

    Args:
        stage: as DVC names it, `train@001`.
    """
    from dvc.repo import Repo

    with Repo(".") as repo:
        outputs = {out.def_path for other in repo.index.stages if not other.is_data_source for out in other.outs}
        return [dep.def_path for dep in repo.stage.load_one(name=stage).deps if dep.def_path in outputs]


def sources() -> list[str]:
    """Return the `.dvc` files: data that is not the output of a stage."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        return [stage.addressing for stage in repo.index.stages if stage.is_data_source]


def upstream() -> str | None:
    """Return the upstream branch (`origin/main`), or None without one or without Git."""
    done = git("rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{upstream}")
    return done.stdout.strip() if done.returncode == 0 else None


def fast_forward() -> None:
    """Fast-forward to the upstream branch. Entries of dvc.lock that are only in this clone stay.

    Raises:
        UserError: this clone has changes or commits that upstream does not have, or an identity that is not in Git, or
            Git can't reach it.
    """
    with _locked():
        branch = _fetch()
        if changed := _git("diff", "--name-only", "HEAD", "--", *SOURCES).split():
            raise UserError(
                f"{changed[0]} has uncommitted changes; commit and `git push` them before a run that pushes"
            )
        if not _git("ls-files", "--", IDENTITY_FILE).strip():
            raise UserError(
                f"{IDENTITY_FILE} is not in Git, so each runner would be its own project; commit and `git push` it,"
                " or delete it and `git pull` if another clone has"
            )
        if _git("rev-list", f"{branch}..HEAD").strip():
            raise UserError(f"this branch has commits that are not in {branch}; `git pull --rebase`, then `git push`")
        committed = _entries("HEAD")
        own = {stage: entry for stage, entry in read_dvc_lock(Path()).items() if committed.get(stage) != entry}
        _git("checkout", "HEAD", "--", LOCK_FILE) if committed else Path(LOCK_FILE).unlink(missing_ok=True)
        try:
            _git("merge", "--quiet", "--ff-only", branch)
        finally:
            entries = _entries("HEAD")
            if any(entries.get(stage) != entry for stage, entry in own.items()):
                Path(LOCK_FILE).write_bytes(dump_dvc_lock(entries | own))


def push_lock_entry(stage: str) -> bool:
    """Commit a stage's entry of dvc.lock to the upstream branch, on top of the commits that others pushed meanwhile.

    Its outputs must be in the DVC remote already.

    Returns:
        False if upstream has the same entry.

    Raises:
        UserError: Git can't reach upstream or is not allowed to push.
    """
    with _locked():
        entry = read_dvc_lock(Path())[stage]
        for _ in range(ATTEMPTS):
            branch = _fetch()
            entries = _entries(branch)
            if entries.get(stage) == entry:
                return False
            commit = _commit(branch, dump_dvc_lock(entries | {stage: entry}), f"dvc.lock: {stage}")
            pushed = git("push", "--quiet", _remote(branch), f"{commit}:refs/heads/{_name(branch)}")
            if pushed.returncode == 0:
                return True
            if not any(word in pushed.stderr for word in ("fetch first", "non-fast-forward", "cannot lock ref")):
                break  # not a race with another runner: a retry would fail, too
        raise UserError(f"dvc.lock: {stage} could not be pushed to {branch}: {_last_line(pushed.stderr)}")


def _commit(parent: str, lock_file: bytes, message: str) -> str:
    with tempfile.TemporaryDirectory() as folder:  # a private index
        environ = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        blob = _git("hash-object", "-w", "--stdin", stdin=lock_file.decode()).strip()
        _git("read-tree", parent, environ=environ)
        _git("update-index", "--add", "--cacheinfo", f"100644,{blob},{_in_tree(LOCK_FILE)}", environ=environ)
        tree = _git("write-tree", environ=environ).strip()
        return _git("commit-tree", tree, "-p", parent, "-m", message, environ=_identity()).strip()


def _identity() -> dict[str, str]:
    """Return the environment for commits on a machine where Git knows no author."""
    known = git("config", "user.email").stdout.strip() or os.environ.get("GIT_AUTHOR_EMAIL")
    fields = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    return {} if known else dict(zip(fields, ("srpo", "srpo@localhost") * 2, strict=True))


@contextmanager
def _locked() -> Iterator[None]:
    """Hold DVC's lock, so that no `dvc` command writes dvc.lock meanwhile."""
    from dvc.repo import Repo

    with _one_at_a_time, Repo(".", _wait_for_lock=True) as repo, repo.lock:
        yield


def _fetch() -> str:
    branch = upstream()
    if branch is None:
        raise UserError("this branch has no upstream; run `git push --set-upstream origin <branch>`")
    _git("fetch", "--quiet", _remote(branch))
    return branch


def _remote(branch: str) -> str:
    return branch.split("/", 1)[0]


def _name(branch: str) -> str:
    return branch.split("/", 1)[1]


def _in_tree(path: str) -> str:
    return _git("rev-parse", "--show-prefix").strip() + path


def _entries(commit: str) -> dict[str, Any]:
    return parse_dvc_lock(git("show", f"{commit}:{_in_tree(LOCK_FILE)}").stdout)  # empty if the commit has none


def _git(*arguments: str, stdin: str | None = None, environ: dict[str, str] | None = None) -> str:
    done = git(*arguments, stdin=stdin, environ=environ)
    if done.returncode != 0:
        raise UserError(f"git {arguments[0]}: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no error message"])[-1]
