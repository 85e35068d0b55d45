"""Run commands as process groups whose lines stream into a logger and that never outlive their tasks."""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from srpo.runtime.processes import end_with_parent, signal_at_parents_end

TERM_GRACE_SECONDS = 15
PROGRESS_SECONDS = 30
TAIL_LINES = 200

stopping = threading.Event()  # set while everything here is being ended
_running: set[subprocess.Popen] = set()
_starting = threading.Lock()


class Stopped(RuntimeError):
    """The flow is being ended; nothing new is started."""


def run_group(
    command: Sequence[str], on_line: Callable[[str], None], on_state: Callable[[str], None] = lambda state: None
) -> tuple[int, list[str]]:
    """Run `command` and hand each line of its output (stderr included) to `on_line` as it comes.

    Whatever ends the wait (an exception, a signal turned into one, `end_all` by another thread) also ends the whole
    process group: SIGTERM, then SIGKILL after 15 s. If this process is killed outright, the kernel ends the child.

    Args:
        on_state: gets what a progress bar shows, each time something of it is read.

    Returns:
        The exit code, negative for a signal as in `subprocess`, and the last 200 lines.

    Raises:
        Stopped: `end_all` came before or meanwhile.
    """
    with _starting:  # so that `end_all` sees every process, or no more are started
        if stopping.is_set():
            raise Stopped
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
        _running.add(process)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        for line in _lines(process.stdout.fileno(), on_state):
            tail.append(line)
            on_line(line)
        code = process.wait()
    finally:
        end_group(process)
        _running.discard(process)
        process.stdout.close()
    if stopping.is_set():
        raise Stopped
    return code, list(tail)


def _environment() -> dict[str, str]:
    # dvc.yaml says `srpo`: this Python's, where no environment is activated
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    # unbuffered: else lines wait in the child until it has 8 kB of them
    return os.environ | {"PYTHONUNBUFFERED": "1", "PATH": path}


def is_running() -> bool:
    """Whether any command runs now."""
    return bool(_running)


def end_all() -> None:
    """End every running command, whatever thread waits for it, and start no other until `stopping` is cleared."""
    with _starting:
        stopping.set()
        enders = [threading.Thread(target=end_group, args=[process]) for process in _running]
    for thread in enders:
        thread.start()
    for thread in enders:
        thread.join()


def end_with_worker() -> None:
    """Have the kernel send SIGTERM when the worker that runs this flow is gone: it could not be cancelled any more."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        signal_at_parents_end(signal.SIGTERM)()


def _lines(fd: int, on_state: Callable[[str], None]) -> Iterator[str]:
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
        if "\r" in pending:
            on_state(_last_state(pending))
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
