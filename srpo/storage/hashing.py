"""Content hashes of files and folders, and seeds derived from names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SIDE_FILES = ("Thumbs.db", "desktop.ini")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's (relative name, content) pairs in name order.

    Side files that programs leave in a folder, such as `.git`, `.cache` and `.DS_Store`, do not count.
    """
    if path.is_file():
        return file_digest(path)
    files = sorted(item for item in path.rglob("*") if item.is_file() and not _is_side_file(item.relative_to(path)))
    return value_digest([(item.relative_to(path).as_posix(), file_digest(item)) for item in files])


def _is_side_file(name: Path) -> bool:
    return name.name in SIDE_FILES or any(part.startswith(".") for part in name.parts)


def dvc_digest(path: Path) -> str:
    """Return the hash of a file or folder in dvc.lock: the md5 of its bytes, or of its listing with suffix `.dir`.

    The listing is the one in DVC's cache: JSON of every file's md5 and relative path, sorted by path.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    files = {item.relative_to(path).as_posix(): item for item in path.rglob("*") if item.is_file()}
    listing = json.dumps([{"md5": dvc_digest(files[name]), "relpath": name} for name in sorted(files)])
    return f"{hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest()}.dir"


def value_digest(value: Any) -> str:
    """Return the sha256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
