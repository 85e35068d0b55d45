"""An optional server that has imported everything and forks a process per command, which starts in milliseconds.

Importing torch, diffusers, transformers, PEFT and MLflow takes 10 to 50 s on two slow cores, and a campaign runs dozens
of `srpo` and `dvc` processes. That matters for the tiny demo and little else, so the server runs only on request: with
`SRPO_WARM=1` or `--warm`, the flow starts one (fork_server_process.py). Commands that find its socket in
`SRPO_FORK_SERVER` send it their arguments, folder, environment and standard streams, and return the exit code of the
child that it forks. Without a server, and on systems other than Linux, each command runs in its own process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REQUEST_VARIABLE = "SRPO_WARM"
SOCKET_VARIABLE = "SRPO_FORK_SERVER"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STARTED = b"+"


def submit(command: list[str]) -> int | None:
    """Have the server run `command` (`srpo ...` or `dvc ...`) with this process's streams, and wait for its end.

    Returns:
        Its exit code, 128 + n if signal n ended it, or None if no server accepted it.
    """
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    request = json.dumps({"argv": command, "cwd": str(Path.cwd()), "environ": dict(os.environ)}).encode()
    try:
        connection.connect(path)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        if connection.recv(1) != STARTED:
            return None
    except OSError:
        return None

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    for number in FORWARDED:
        signal.signal(number, forward)
    code = b""
    with contextlib.suppress(ConnectionError):
        code = connection.recv(1)
    if not code:  # the server was killed, and the kernel killed the command with it
        print("srpo: the fork server was killed", file=sys.stderr)
    return code[0] if code else 128 + signal.SIGKILL


def if_requested() -> contextlib.AbstractContextManager[None]:
    """Return `running()` if SRPO_WARM=1, else a context manager that does nothing."""
    return running() if os.environ.get(REQUEST_VARIABLE) == "1" else contextlib.nullcontext()


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a server while the block runs; a server that runs already is used instead."""
    if sys.platform != "linux" or _accepts_connections(os.environ.get(SOCKET_VARIABLE)):
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="srpo-", ignore_cleanup_errors=True
    ) as folder:  # the path of a socket must be short
        path = str(Path(folder, "socket"))
        # its own session: Ctrl-C reaches each command through its client only
        server = subprocess.Popen(
            [sys.executable, "-m", "srpo.runtime.fork_server_process", path],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        while not Path(path).exists() and server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.02)
        os.environ[SOCKET_VARIABLE] = path
        try:
            yield
        finally:
            os.environ.pop(SOCKET_VARIABLE, None)
            server.terminate()
            try:
                server.wait(15)  # the signal is handled after the current import
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if server.stdin:
                server.stdin.close()


def run_inline(argv: list[str]) -> int:
    """Run a `srpo` or `dvc` command in this process and return its exit code."""
    module, function = {"srpo": ("srpo.cli", "run"), "dvc": ("dvc.cli", "main")}[argv[0]]
    sys.argv = list(argv)
    return getattr(importlib.import_module(module), function)(argv[1:])


def _accepts_connections(path: str | None) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        if path:
            connection.connect(path)
            return True
    return False


if __name__ == "__main__":
    exit_code = submit(sys.argv[1:])
    sys.exit(run_inline(sys.argv[1:]) if exit_code is None else exit_code)
