"""Atomic and durable writes: a file is complete or absent, also after a crash or a power failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, sync that file and rename it to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was. Processes may write the same
    `path` at once: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def publish(scratch: Path, out: Path) -> None:
    """Move a finished scratch folder, or file, to its place under rounds/ in one rename.

    Its files are synced first. An earlier `out` is replaced as a whole: readers see the old one, none, or the new one.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in scratch.rglob(".*.partial"):  # of a killed `atomic_write`
        leftover.unlink()
    for item in (scratch, *scratch.rglob("*")):
        _sync(item)
    if out.is_dir():
        old = scratch.with_name(f"{scratch.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        out.replace(old)
        scratch.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.replace(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
