"""Run a command as a process group whose lines stream into a logger and that never outlives its task."""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from srpo.warm import end_with_parent

TERM_GRACE_SECONDS = 15
PROGRESS_SECONDS = 30
TAIL_LINES = 200


def run_group(command: Sequence[str], on_line: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run `command` and hand each line of its output (stderr included) to `on_line` as it comes.

    Whatever ends the wait (cancellation, an exception, a signal turned into one) also ends the whole process
    group: SIGTERM, then SIGKILL after 15 s. If this process is killed outright, the kernel ends the child.

    Returns:
        The exit code, negative for a signal as in `subprocess`, and the last 200 lines.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # else lines wait in the child until it has 8 kB of them
        start_new_session=True,
        preexec_fn=end_with_parent(signal.SIGTERM),
    )
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        for line in _lines(process.stdout.fileno()):
            tail.append(line)
            on_line(line)
        return process.wait(), list(tail)
    finally:
        end_group(process)
        process.stdout.close()


def _lines(fd: int) -> Iterator[str]:
    """Lines as they come. Of the states a progress bar draws over each other: one in 30 s, and the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end inside a character
    pending, shown_at = "", time.monotonic()
    while data := os.read(fd, 65536):
        *whole, pending = (pending + decoder.decode(data)).split("\n")
        for line in whole:
            if state := _last_state(line):
                yield state
        if whole:
            shown_at = time.monotonic()
        elif "\r" in pending and time.monotonic() - shown_at > PROGRESS_SECONDS:
            if state := _last_state(pending):
                yield state
            shown_at = time.monotonic()
        if pending.count("\r") > 1:  # forget states that are drawn over
            last = pending.rstrip("\r").rpartition("\r")[2]
            pending = f"\r{last}\r" if pending.endswith("\r") else f"\r{last}"
    if state := _last_state(pending):
        yield state


def _last_state(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2].rstrip()


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads a group, and all of its group: SIGTERM, after 15 s SIGKILL."""
    for number, grace in ((signal.SIGTERM, TERM_GRACE_SECONDS), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # what the leader left behind
        os.killpg(process.pid, signal.SIGKILL)
