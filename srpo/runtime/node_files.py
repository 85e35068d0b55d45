"""Files on the machines of a cluster: sent once per machine, kept by content, laid out as in the project.

A machine keeps files under their sha256 in `srpo/files` of the user's cache folder (XDG_CACHE_HOME) and removes those
that were not used for a week. Each process has a folder of links to them, with the project's paths.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from srpo.storage.files import atomic_write
from srpo.storage.hashing import file_digest

CHUNK_BYTES = 64 * 2**20
KEPT_SECONDS = 7 * 86400

Manifest = dict[str, str]
"""The sha256 of each file, by its path relative to the project."""


def manifest(root: Path, paths: Iterable[Path]) -> Manifest:
    """Return the manifest of these files, and of all files in these folders."""
    found = [path for top in paths for path in ([top] if top.is_file() else top.rglob("*"))]
    files = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix(): file_digest(path) for path in files}


def chunks(path: Path) -> Iterator[np.ndarray]:
    """Yield a file's bytes as uint8 arrays of at most CHUNK_BYTES, mapped from the disk."""
    if size := path.stat().st_size:
        data = np.memmap(path, np.uint8, "r")
        yield from (data[start : start + CHUNK_BYTES] for start in range(0, size, CHUNK_BYTES))


class NodeFiles:
    """A machine's files, and this process's folder of links to them."""

    def __init__(self) -> None:
        """Remove what ended processes left behind, and make the folder."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
        self._files = cache / "files"
        self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in self._files.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink(missing_ok=True)
        for folder in (cache / "processes").glob("*"):
            if not _is_running(int(folder.name)):
                shutil.rmtree(folder, ignore_errors=True)
        self.root = cache / "processes" / str(os.getpid())
        self.root.mkdir(parents=True, exist_ok=True)

    def missing(self, files: Manifest) -> set[str]:
        """Return the digests of the files that this machine does not have; the others are kept for another week."""
        missing = set()
        for sha256 in set(files.values()):
            try:
                os.utime(self._files / sha256)
            except FileNotFoundError:
                missing.add(sha256)
        return missing

    def add(self, parts: Mapping[str, Iterable[Any]]) -> None:
        """Keep the contents of files, by their digests: arrays of uint8 that together are the file."""
        for sha256, arrays in parts.items():
            with atomic_write(self._files / sha256) as partial, partial.open("wb") as file:
                for array in arrays:
                    file.write(memoryview(array))

    def lay_out(self, files: Manifest) -> None:
        """Link files to their places."""
        for name, sha256 in files.items():
            place = self.root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            os.link(self._files / sha256, place)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
