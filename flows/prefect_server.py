"""A Prefect server for a flow that is run by hand, where none is configured; and an end for a flow that lost its own.

Prefect would start one itself, but among the flow's own processes and with nothing that ends it: Ctrl-C would stop
the server before the flow could tell it so, and a flow that is killed would leave it running.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    get_current_settings,
    temporary_settings,
)

from flows.process import end_group, is_running
from srpo.runtime.processes import end_with_parent

# on disk: this server ends before a lease does that a killed flow held, and the next server must know of it
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
START_SECONDS = 300  # the first start migrates an empty database: 26 s on two slow cores


# without its server a flow can start nothing, and would go on trying for hours
PATIENCE_SECONDS = float(os.environ.get("SRPO_SERVER_PATIENCE", "300"))
POLL_SECONDS = 5


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


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While the block runs, exit with status 1 and a line when the server has been away for five minutes.

    As long as a stage runs nothing is ended: what it makes is kept, whether or not anyone can be told.
    """
    over, context = threading.Event(), contextvars.copy_context()  # which holds the server's address
    threading.Thread(target=context.run, args=(_watch, over), name="srpo-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(over: threading.Event) -> None:
    seen = time.monotonic()
    while not over.wait(POLL_SECONDS):
        if is_running() or not _is_away():
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_SECONDS and not is_running():
            print(
                f"srpo: error: Prefect's server at {PREFECT_API_URL.value()} has been away for {PATIENCE_SECONDS:.0f}"
                " s; all finished stages are kept: run the same again when it is back",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _is_away() -> bool:
    # Prefect's own client, which knows of keys and proxies
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _is_up(process: subprocess.Popen, address: str) -> bool:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health", trust_env=False).is_success:
                return True
        time.sleep(0.1)
    return False
