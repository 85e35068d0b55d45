"""`srpo prune`: deletion of the candidates of decided rounds, which are most of a campaign's bytes.

Winners, adapters, metrics and reports stay, and so do all objects that another entry of dvc.lock refers to, on any
branch or tag. A registered version needs none of the candidates.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.lineage.dvc_lock import LOCK_FILE, parse_dvc_lock, read_dvc_lock
from srpo.rounds import RoundFiles
from srpo.runtime.extras import require
from srpo.runtime.round_lock import lock_round
from srpo.storage.git import git

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

STAGES = ("generate", "report")  # the last one depends on all others


@dataclass
class Pruned:
    """Bytes of one round's candidates that are, or would be, freed."""

    key: str
    workspace: int = 0
    cache: int = 0
    remote: int = 0


def prune(params: Params, root: Path, keys: list[str] | None = None, delete: bool = False) -> list[Pruned]:
    """Delete the candidates of decided rounds from workspace, DVC's cache and the default remote.

    Args:
        keys: rounds; None means all decided ones.
        delete: without it, only count bytes.

    Raises:
        UserError: a named round is unknown or not decided, or DVC is not installed.
        BlockedError: a command works on one of the rounds.
    """
    require("dvc", "`srpo prune`")
    from dvc.repo import Repo

    lock = read_dvc_lock(root)
    for key in keys or ():
        params.for_round(key)  # raises: unknown round
        if not _is_decided(root, key, lock):
            raise UserError(f"rounds.{key}: not decided yet; `dvc repro report@{key}` completes it")
    keys = [key for key in params.rounds if _is_decided(root, key, lock)] if keys is None else keys
    with Repo(str(root)) as repo, repo.lock:
        remote = repo.cloud.get_remote_odb() if repo.config["core"].get("remote") else None
        stores = [store for store in (repo.cache.local, remote) if store is not None]
        candidates = {key: hash_ for key in keys if (hash_ := _candidates_hash(lock, key))}
        needed = _needed(stores, _kept_hashes(root, lock, candidates))
        return [_prune_round(root, key, candidates.get(key), repo, remote, needed, delete) for key in keys]


def _is_decided(root: Path, key: str, lock: dict[str, Any]) -> bool:
    files = RoundFiles(root, key)
    complete = all(f"{stage}@{key}" in lock for stage in STAGES)
    return complete and files.winners.exists() and (files.evaluation / "gate.json").exists()


def _prune_round(
    root: Path, key: str, hash_: str | None, repo: Repo, remote: HashFileDB | None, needed: set[str], delete: bool
) -> Pruned:
    files = RoundFiles(root, key)
    freed = Pruned(key)
    with lock_round(files, "prune"):
        oids = _listing([repo.cache.local, *([remote] if remote else [])], hash_) - needed if hash_ else set()
        inodes: set[int] = set()  # a file of the workspace may be a hard link to the cache
        cached = [Path(repo.cache.local.oid_to_path(oid)) for oid in oids]
        freed.cache = _file_bytes((path for path in cached if path.exists()), inodes)
        if files.candidates.exists():
            freed.workspace = _file_bytes((path for path in files.candidates.rglob("*") if path.is_file()), inodes)
        if remote is not None:
            on_remote = [oid for oid in oids if remote.exists(oid)]
            freed.remote = sum(remote.fs.size(remote.oid_to_path(oid)) for oid in on_remote)
            for oid in on_remote if delete else ():
                remote.delete(oid)
        if delete:
            for path in cached:
                path.unlink(missing_ok=True)
            shutil.rmtree(files.candidates, ignore_errors=True)
    return freed


def _candidates_hash(lock: dict[str, Any], key: str) -> str | None:
    outs = lock.get(f"generate@{key}", {}).get("outs", [])
    return next((out.get("md5") for out in outs if out.get("path") == f"rounds/{key}/candidates"), None)


def _kept_hashes(root: Path, lock: dict[str, Any], candidates: dict[str, str]) -> set[str]:
    """Return the hashes of all outputs in dvc.lock, here and on all branches and tags, but those to be pruned."""
    refs = git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes", "refs/tags", root=root).stdout
    texts = [git("show", f"{ref}:./{LOCK_FILE}", root=root).stdout for ref in refs.split()]
    pruned = {(f"rounds/{key}/candidates", hash_) for key, hash_ in candidates.items()}
    return {
        out["md5"]
        for stages in (lock, *map(parse_dvc_lock, texts))
        for stage in stages.values()
        for out in stage.get("outs", [])
        if "md5" in out and (out["path"], out["md5"]) not in pruned
    }


def _needed(stores: list[HashFileDB], hashes: Iterable[str]) -> set[str]:
    return {oid for hash_ in hashes for oid in _listing(stores, hash_)}


def _listing(stores: list[HashFileDB], hash_: str) -> set[str]:
    """Return the hashes of a file, or of a folder and its files, as the first store that has the folder lists them."""
    if hash_.endswith(".dir"):
        for store in stores:
            if store.exists(hash_):
                entries = json.loads(store.fs.cat_file(store.oid_to_path(hash_)))
                return {hash_, *(entry["md5"] for entry in entries)}
    return {hash_}


def _file_bytes(paths: Iterator[Path], inodes: set[int]) -> int:
    total = 0
    for path in paths:
        status = path.lstat()
        if status.st_ino not in inodes:
            inodes.add(status.st_ino)
            total += status.st_size
    return total
