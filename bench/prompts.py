"""Prompt files for benches that need only some of the project's."""

from __future__ import annotations

from pathlib import Path


def cut_prompts(source: Path, target: Path, count: int) -> None:
    """Write the first `count` lines of a prompt file to `target`, which may be the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:count]), encoding="utf-8")
