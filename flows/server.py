"""A Prefect server for a flow that is run by hand, where none is configured.

Prefect would start one itself, but among the flow's own processes and with nothing that ends it: Ctrl-C would stop
the server before the flow could tell it so, and a flow that is killed would leave it running.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    get_current_settings,
    temporary_settings,
)

from flows.process import end_group
from srpo.warm import end_with_parent

# on disk: this server ends before a lease does that a killed flow held, and the next server must know of it
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
START_SECONDS = 300  # the first start migrates an empty database: 26 s on two slow cores


class NoServer(RuntimeError):
    """The server did not start."""


@contextlib.contextmanager
def provided() -> Iterator[None]:
    """Have a server while the block runs, on Prefect's usual database; one that the user configured is used instead.

    It ends with this process and not with the block: Prefect's threads send their last logs and events when Python
    waits for them at exit, and would try for a minute without a server.

    Raises:
        NoServer: with what it said.
    """
    if PREFECT_API_URL.value():
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"http://127.0.0.1:{port}/api"
    # without its scheduler: this server is here for one flow
    options = ["--host", "127.0.0.1", "--port", port, "--no-ui", "--no-scheduler", "--no-late-runs"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as words,
        temporary_settings({PREFECT_API_URL: address}, set_defaults={PREFECT_SERVER_ANALYTICS_ENABLED: False}),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", "server", "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=LEASES | os.environ | get_current_settings().to_environment_variables(exclude_unset=True),
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
        atexit.register(end_group, process)
        if not _is_up(process, address):
            words.seek(0)
            raise NoServer(f"Prefect's server did not start: {' '.join(words.read().split()):.300}")
        yield


def _is_up(process: subprocess.Popen, address: str) -> bool:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health", trust_env=False).is_success:
                return True
        time.sleep(0.1)
    return False
