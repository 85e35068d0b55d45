"""Scratch folders that survive a crash.

DVC deletes a stage's outputs before it runs the stage again, so unfinished work can't live there. It lives
in `.srpo/scratch/`, in a folder named by the hash of the stage's inputs: the same inputs find their finished
parts again, other inputs never see them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from srpo.storage.hashing import value_digest


def scratch_folder(root: Path, stage: str, key: str, inputs: Any) -> Path:
    """The scratch folder of this stage, round and JSON-able inputs, made if need be.

    Folders of the same stage and round with other inputs can never be resumed and are removed.
    """
    parent = root / ".srpo" / "scratch"
    folder = parent / f"{stage}@{key}-{value_digest(inputs)[:16]}"
    for stale in parent.glob(f"{stage}@{key}-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
