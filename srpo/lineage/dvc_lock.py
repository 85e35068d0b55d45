"""The hashes in dvc.lock: the files each stage read and wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def read_dvc_lock(root: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock by name (`train@001`), each with `outs` and maybe `deps`; empty without a file."""
    from ruamel.yaml import YAML

    lock = root / "dvc.lock"
    if not lock.exists():
        return {}
    return (YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}


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
