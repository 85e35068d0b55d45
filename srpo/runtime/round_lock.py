"""One process at a time works on a round. The kernel frees the lock when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srpo.errors import BlockedError
from srpo.rounds import RoundFiles
from srpo.runtime import distributed

GRACE_SECONDS = 2  # a process that was just killed may take a moment to be gone


@contextmanager
def lock_round(files: RoundFiles, stage: str) -> Iterator[None]:
    """Hold a round (or base) while the block runs; other rounds are free. Others are told `srpo <stage> <key>`.

    Of a command in many processes the one that started them holds the round.

    Raises:
        BlockedError: another process works on the round.
        OSError: there is no writing to `.srpo/` or `rounds/`.
    """
    if distributed.PARENT_VARIABLE in os.environ or distributed.rank():
        yield
        return
    from filelock import FileLock

    folder, key = files.root / ".srpo", files.key
    folder.mkdir(exist_ok=True)
    holder = folder / f"round@{key}.json"  # beside the lock, which some versions of the library empty
    lock = FileLock(folder / f"round@{key}.lock", timeout=GRACE_SECONDS)
    try:
        lock.acquire()
    except TimeoutError:
        raise BlockedError(f"rounds/{key} is being worked on by {_told(holder)}; wait or end it") from None
    with lock:
        _check_writable(files.folder)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "command": f"srpo {stage} {key}", "since": since}
        holder.write_text(json.dumps(me), encoding="utf-8")
        yield
        holder.unlink(missing_ok=True)


def _told(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return "process {pid} on host {host} ({command}, since {since})".format_map(found)
    except (OSError, ValueError, KeyError):  # it has only just begun
        return "another process"


def _check_writable(folder: Path) -> None:
    """Now rather than after hours: files are renamed to there when the stage is done."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise BlockedError(f"{there}: not writable (read-only, or not this user's); make it so and run this again")
