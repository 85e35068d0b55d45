"""Run a command as a process group whose lines stream into a logger and that never outlives its task."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

TERM_GRACE_SECONDS = 15
_LINE_END = re.compile(r"[\r\n]")


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
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    tail: list[str] = []
    try:
        for line in _lines(process.stdout.fileno()):
            tail = [*tail[-199:], line]
            on_line(line)
        return process.wait(), tail
    finally:
        _end_group(process)
        process.stdout.close()


def _lines(fd: int) -> Iterator[str]:
    """Lines as they come. Of the states a progress bar draws over each other only the last one counts."""
    pending = ""
    while data := os.read(fd, 65536):
        *whole, pending = (pending + data.decode(errors="replace")).split("\n")
        for line in whole:
            if shown := line.rstrip("\r").rpartition("\r")[2].rstrip():
                yield shown
    if shown := _LINE_END.split(pending)[-1].rstrip():
        yield shown


def _end_group(process: subprocess.Popen) -> None:
    for number, grace in ((signal.SIGTERM, TERM_GRACE_SECONDS), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # what the leader left behind
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
