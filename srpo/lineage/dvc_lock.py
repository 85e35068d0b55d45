"""dvc.lock, the record of what every stage read and wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_dvc_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock by name (`train@001`), each with `outs` and maybe `deps`; empty without a lock file."""
    from ruamel.yaml import YAML

    lock = root / "dvc.lock"
    if not lock.exists():
        return {}
    return (YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
