"""Candidates from elsewhere: a folder of shards without latents, whose name holds the hash of their content.

A param that names the folder makes exactly one round's `generate` rerun when other candidates are named.
"""

from __future__ import annotations

import re
from pathlib import Path

from srpo.data import parquet
from srpo.errors import UserError
from srpo.storage.hashing import digest

NAME = re.compile(r"candidates-[0-9a-f]{16}")
ROWS = 128  # of a shard, which is also the unit of resume of `generate`


def imported_name(folder: Path) -> str:
    """Return the name that belongs to the folder's content."""
    return f"candidates-{digest(folder)[:16]}"


def imported_shards(folder: Path, key: str) -> list[Path]:
    """Return the shards of imported candidates of round `key`.

    Raises:
        UserError: no such folder, or not the content that its name says.
    """
    param = f"rounds.{key}.generate.candidates"
    if not NAME.fullmatch(folder.name):
        raise UserError(f"{param}: {folder.name}: `srpo candidates import {key}` writes candidates-<hash>")
    if not folder.is_dir():
        raise UserError(f"{param}: {folder}: no such folder; `dvc pull` restores it if it is under DVC")
    if imported_name(folder) != folder.name:
        raise UserError(f"{folder}: changed since it was written; `dvc checkout` restores it, or import it again")
    return parquet.shards(folder)
