"""A checksum for the one part of a parquet file that has none: its footer.

A parquet file ends with its footer, the footer's length and the word PAR1, and says by offsets from its start where
pages are. So what stands between pages and footer is nobody's, and any reader of parquet passes over it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MARK = b"srpo:footer-sha256:"
SEAL = len(MARK) + hashlib.sha256().digest_size
TAIL = 8  # the footer's length, 4 bytes, and PAR1


def seal(path: Path) -> None:
    """Write the sha256 of a parquet file's footer before it."""
    with path.open("r+b") as file:
        start, ending = _ending(file)
        file.seek(start)
        file.write(MARK + hashlib.sha256(ending).digest() + ending)


def is_sound(path: Path) -> bool:
    """Whether the footer is the one that was sealed. True for a file without a seal, which others wrote.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        start, ending = _ending(file)
        file.seek(max(0, start - SEAL))
        found = file.read(SEAL)
    return not found.startswith(MARK) or found == MARK + hashlib.sha256(ending).digest()


def _ending(file) -> tuple[int, bytes]:
    """Where the footer starts, and all bytes from there."""
    size = file.seek(0, 2)
    file.seek(max(0, size - TAIL))
    length = int.from_bytes(file.read(TAIL)[:4], "little")
    start = max(0, size - TAIL - length)
    file.seek(start)
    return start, file.read()
