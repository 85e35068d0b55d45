"""Files that are whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path


def publish(scratch: Path, out: Path) -> None:
    """Move a finished scratch folder (or file) to its place under rounds/ in one rename.

    What was there goes away whole, too: whoever looks finds the old, nothing, or the new.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.is_dir():
        scratch.replace(out)
        return
    old = scratch.with_name(f"{scratch.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.replace(old)
    scratch.replace(out)
    shutil.rmtree(old, ignore_errors=True)
