"""What the tests of bad input share: changing a project's files, and listing them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

Change = Callable[[Path], object]
"""Spoils something in the project folder it is given."""


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a project but its scratch and Python's compiled files."""
    entries = (entry for entry in root.rglob("*") if not {".srpo", "__pycache__"} & set(entry.relative_to(root).parts))
    return {
        str(entry.relative_to(root)): (0, 0) if entry.is_dir() else (entry.lstat().st_size, entry.lstat().st_mtime_ns)
        for entry in entries
    }


def read_params(root: Path) -> dict[str, Any]:
    """params.yaml as plain values."""
    return YAML(typ="safe").load((root / "params.yaml").read_text(encoding="utf-8"))


def write_params(root: Path, raw: Any) -> None:
    """Write params.yaml as JSON, which is YAML; NaN and infinity as YAML spells them."""
    text = json.dumps(raw).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
    (root / "params.yaml").write_text(text, encoding="utf-8")


def param(key: str, value: Any) -> Change:
    """Set one key of params.yaml, its path written with slashes."""

    def change(root: Path) -> None:
        raw = read_params(root)
        *sections, last = key.split("/")
        at = raw
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
        write_params(root, raw)

    return change


def content(name: str, data: str | bytes) -> Change:
    """Write a file of the project anew."""

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def prompts(*lines: str | bytes, file: str = "train") -> Change:
    """Write a prompt file of these lines."""
    return content(f"data/prompts/{file}.jsonl", b"\n".join(x.encode() if isinstance(x, str) else x for x in lines))


def replaced(old: str, new: str) -> Change:
    """Put other words into params.yaml, once."""

    def change(root: Path) -> None:
        text = (root / "params.yaml").read_text(encoding="utf-8")
        assert old in text
        (root / "params.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")

    return change
