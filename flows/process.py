"""Commands as process groups, whose output lines are logged and which end with their tasks."""

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

stopping = threading.Event()  # set while all commands are being stopped
_running: set[subprocess.Popen] = set()
_starting = threading.Lock()


class Stopped(RuntimeError):
    """The flow is being stopped; no command is started."""


def ignore_state(state: str) -> None:
    """Do nothing with the text of a progress bar."""


def run_group(
    command: Sequence[str], on_line: Callable[[str], None], on_state: Callable[[str], None] = ignore_state
) -> tuple[int, list[str]]:
    """Run `command` and pass each line of its output, with stderr, to `on_line`.

    When the wait ends early (by an exception, an interrupt, or `end_all` in another thread), the whole process group is
    stopped: SIGTERM, and SIGKILL after 15 s. If this process is killed, the kernel stops the child.

    Args:
        on_line: called with each complete line.
        on_state: called with the current text of a progress bar, at every read.

    Returns:
        The exit code, negative for a signal as in `subprocess`, and the last 200 lines.

    Raises:
        Stopped: `end_all` was called before or during the run.
    """
    with _starting:  # `end_all` sees every process that is started
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
        assert process.stdout
        for line in _lines(process.stdout.fileno(), on_state):
            tail.append(line)
            on_line(line)
        code = process.wait()
    finally:
        end_group(process)
        _running.discard(process)
        if process.stdout:
            process.stdout.close()
    if stopping.is_set():
        raise Stopped
    return code, list(tail)


def _environment() -> dict[str, str]:
    # dvc.yaml calls `srpo`: find this Python's, even if no environment is activated
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    # unbuffered: else the child holds back 8 kB of lines
    return os.environ | {"PYTHONUNBUFFERED": "1", "PATH": path}


def is_running() -> bool:
    """Return whether any command is running."""
    return bool(_running)


def end_all() -> None:
    """Stop all running commands of all threads, and start no others until `stopping` is cleared."""
    with _starting:
        stopping.set()
        enders = [threading.Thread(target=end_group, args=[process]) for process in _running]
    for thread in enders:
        thread.start()
    for thread in enders:
        thread.join()


def end_with_worker() -> None:
    """Have the kernel send SIGTERM when this flow's worker ends: the flow could no longer be cancelled."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        signal_at_parents_end(signal.SIGTERM)()


def _lines(fd: int, on_state: Callable[[str], None]) -> Iterator[str]:
    """Yield lines. Of a progress bar, yield its text every 30 s, and the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end inside a character
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
        if pending.count("\r") > 1:  # drop overwritten states
            last = pending.rstrip("\r").rpartition("\r")[2]
            pending = f"\r{last}\r" if pending.endswith("\r") else f"\r{last}"
    if state := _last_state(pending):
        yield state


def _last_state(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2].rstrip()


def end_group(process: subprocess.Popen) -> None:
    """Stop a process that leads a group, and the group: SIGTERM, after 15 s SIGKILL."""
    for number, grace in ((signal.SIGTERM, TERM_GRACE_SECONDS), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # children that the leader left
        os.killpg(process.pid, signal.SIGKILL)
