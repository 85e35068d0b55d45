"""Scratch folders for unfinished outputs, which survive a crash.

DVC deletes a stage's outputs before it runs the stage again, so unfinished files are kept in `.srpo/scratch/`, in a
folder named by the hash of what they depend on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from srpo.storage.hashing import value_digest


def scratch_folder(root: Path, stage: str, key: str, resume_key: Any = None) -> Path:
    """Return the scratch folder of this stage and round, created if missing.

    Args:
        resume_key: JSON-able; everything that the unfinished output depends on. Folders of the same stage and round
            with another key are removed: their files can't be used. None for a stage that starts over.
    """
    parent = root / ".srpo" / "scratch"
    folder = parent / f"{stage}@{key}-{value_digest(resume_key)[:16]}"
    for stale in parent.glob(f"{stage}@{key}-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
