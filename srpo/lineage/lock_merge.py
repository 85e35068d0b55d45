"""Merging dvc.lock by entry: branches that ran different rounds never conflict, although their lines do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo.errors import UserError
from srpo.lineage.dvc_lock import LOCK_FILE, parse_dvc_lock
from srpo.storage.git import git

log = logging.getLogger(__name__)

DRIVER = "srpo-lock"  # in .gitattributes and Git's config
COMMAND = "srpo lock merge %O %A %B"
ATTRIBUTE = f"{LOCK_FILE} merge={DRIVER}"
Stages = Mapping[str, Any]


def merge_files(base: Path, ours: Path, theirs: Path) -> None:
    """Merge three versions of dvc.lock and write the result to `ours`, as Git asks of a merge driver.

    Raises:
        UserError: a version is damaged.
    """
    versions = [parse_dvc_lock(path.read_text(encoding="utf-8")) for path in (base, ours, theirs)]
    ours.write_bytes(dump_dvc_lock(merge_stages(*versions)))


def merge_index(root: Path) -> None:
    """Resolve a conflict that Git has left in dvc.lock, from the versions in Git's index.

    Raises:
        UserError: Git has no conflict in this file, or a version is damaged.
    """
    versions: list[dict[str, Any]] = []
    for number in (1, 2, 3):  # common ancestor, ours, theirs
        shown = git("show", f":{number}:./{LOCK_FILE}", root=root)
        if shown.returncode != 0 and number > 1:
            raise UserError(f"{LOCK_FILE}: Git has no conflict in this file; nothing to merge")
        versions.append(parse_dvc_lock(shown.stdout))
    (root / LOCK_FILE).write_bytes(dump_dvc_lock(merge_stages(*versions)))


def merge_stages(base: Stages, ours: Stages, theirs: Stages) -> dict[str, Any]:
    """Return all entries of both sides, without those that one side deleted and the other left unchanged.

    If both sides changed an entry, that of `ours` is kept, with a warning: `dvc repro` compares it with params and
    inputs, and runs the stage if it does not fit them.
    """
    merged = {}
    for stage in [*ours, *(stage for stage in theirs if stage not in ours)]:
        own = ours.get(stage)
        other = theirs.get(stage)
        ancestor = base.get(stage)
        entry = other if own == ancestor else own
        if own is not None and other is not None and ancestor not in (own, other) and own != other:
            log.warning("%s: both branches ran %s; ours is kept, and `dvc repro` checks it", LOCK_FILE, stage)
        elif entry is None and other != ancestor:  # deleted by one side and changed by the other
            entry = other
        if entry is not None:
            merged[stage] = entry
    return merged


def dump_dvc_lock(stages: Stages) -> bytes:
    """Return the bytes of a dvc.lock with these entries, as DVC writes them."""
    from dvc.utils.serialize import dumps_yaml

    return dumps_yaml({"schema": "2.0", "stages": dict(stages)}).encode()
