"""The hashes in dvc.lock: the files each stage read and wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from srpo.errors import UserError
from srpo.storage.conflicts import check_no_conflict

LOCK_FILE = "dvc.lock"


def read_dvc_lock(root: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock by name (`train@001`), each with `outs` and maybe `deps`; empty without a file.

    Raises:
        UserError: the file has Git's conflict markers or is damaged.
    """
    lock = root / LOCK_FILE
    return parse_dvc_lock(lock.read_text(encoding="utf-8", errors="replace")) if lock.exists() else {}


def parse_dvc_lock(text: str) -> dict[str, Any]:
    """Return the stages in the text of a dvc.lock.

    Raises:
        UserError: it has Git's conflict markers or is damaged.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    check_no_conflict(LOCK_FILE, text, "run `srpo lock merge`, then `git add dvc.lock`")
    try:
        content = YAML(typ="safe").load(text) or {}
        stages = content.get("stages") or {}
        return dict(stages)
    except (YAMLError, AttributeError, TypeError, ValueError):
        raise UserError(f"{LOCK_FILE}: damaged; restore it with `git checkout {LOCK_FILE}`") from None


def recorded(lock: Mapping[str, Any], stage: str, side: Literal["deps", "outs"]) -> dict[str, str]:
    """Return DVC's hashes, by path, of the files a stage read (`deps`) or wrote (`outs`)."""
    return {item["path"]: item["md5"] for item in lock.get(stage, {}).get(side, []) if "md5" in item}


def round_hashes(root: Path, key: str) -> dict[str, str]:
    """Return DVC's hashes of a round's outputs, by name under rounds/<key>/ (`winners`, `evaluation.gate.json`)."""
    lock, folder = read_dvc_lock(root), f"rounds/{key}/"
    hashes = {path: value for stage in lock for path, value in recorded(lock, stage, "outs").items()}
    return {
        path.removeprefix(folder).replace("/", "."): value for path, value in hashes.items() if path.startswith(folder)
    }
