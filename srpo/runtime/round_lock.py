"""A lock per round, so that one command at a time works on it. The kernel releases it when the process ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock

from srpo.errors import BlockedError
from srpo.rounds import RoundFiles
from srpo.runtime import distributed

TIMEOUT_SECONDS = 2  # a killed process may take a moment to end


@contextmanager
def lock_round(files: RoundFiles, stage: str) -> Iterator[None]:
    """Hold the lock of a round or of base. Workers of a command leave it to the process that started them.

    Raises:
        BlockedError: another process holds it; the message names the process.
        OSError: `.srpo/` is not writable.
    """
    if distributed.PARENT_VARIABLE in os.environ or distributed.rank():
        yield
        return
    folder = files.root / ".srpo"
    folder.mkdir(exist_ok=True)
    holder = folder / f"round@{files.key}.txt"  # not in the lock file: some versions of filelock truncate that
    lock = FileLock(folder / f"round@{files.key}.lock", timeout=TIMEOUT_SECONDS)
    try:
        lock.acquire()
    except TimeoutError:
        text = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise BlockedError(f"rounds/{files.key} is locked by {text}; wait or stop that process") from None
    with lock:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        process = f"process {os.getpid()} on host {socket.gethostname()}"
        holder.write_text(f"{process} (srpo {stage} {files.key}, since {since})", encoding="utf-8")
        yield
        holder.unlink(missing_ok=True)
