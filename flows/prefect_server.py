"""The Prefect server of a flow: a temporary one unless one is configured; a flow that loses its server ends.

Prefect would start a temporary server itself, but in the flow's process group and without an end: Ctrl-C would stop the
server before the flow could report to it, and a killed flow would leave it running.
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
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    get_current_settings,
    temporary_settings,
)

from flows.process import end_group, is_running
from srpo.errors import without_secrets
from srpo.runtime.processes import end_with_parent

# leases on disk: that of a killed flow may outlive this server, and the next server must know it
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
START_SECONDS = 300  # the first start creates the database: 26 s on two slow cores
# without its server a flow can start no stage, and would retry for hours
PATIENCE_SECONDS = float(os.environ.get("SRPO_SERVER_PATIENCE", "300"))
POLL_SECONDS = 5
RETRIES = 8  # of one call; the waits between them, 2, 4, 8... s, are 510 s in all: more than the patience


class NoServer(RuntimeError):
    """There is no usable server. The message is one line."""


@contextlib.contextmanager
def ensure_server() -> Iterator[None]:
    """Check the configured server; without one, run a server on Prefect's default database.

    That server ends with this process and not with the block: Prefect's threads send their last logs and events when
    Python waits for them at exit, and would retry for a minute without a server.

    Raises:
        NoServer: the configured server does not answer or rejects the credentials, or the server did not start.
    """
    if address := PREFECT_API_URL.value():
        _check_server(address)
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"http://127.0.0.1:{port}/api"
    # no scheduler: the server is for one flow
    options = ["--host", "127.0.0.1", "--port", port, "--no-ui", "--no-scheduler", "--no-late-runs"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        temporary_settings({PREFECT_API_URL: address}, set_defaults={PREFECT_SERVER_ANALYTICS_ENABLED: False}),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", "server", "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=LEASES | os.environ | get_current_settings().to_environment_variables(exclude_unset=True),
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
        atexit.register(end_group, process)
        if not _is_up(process, address):
            output.seek(0)
            raise NoServer(f"Prefect's server did not start: {' '.join(output.read().split()):.300}")
        yield


@contextlib.contextmanager
def exit_without_server() -> Iterator[None]:
    """While the block runs, exit with status 1 and a message if the server has been unreachable for five minutes.

    Until then all calls of the server are retried. While a stage runs, the process does not exit: the stage's outputs
    are kept in any case.
    """
    ended = threading.Event()
    context = contextvars.copy_context()  # contains the server's address
    threading.Thread(target=context.run, args=(_watch, ended), name="srpo-watch", daemon=True).start()
    try:
        with temporary_settings(set_defaults={PREFECT_CLIENT_MAX_RETRIES: RETRIES}):
            yield
    finally:
        ended.set()


def _watch(ended: threading.Event) -> None:
    last_seen = time.monotonic()
    while not ended.wait(POLL_SECONDS):
        if is_running() or not _is_unreachable():
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > PATIENCE_SECONDS and not is_running():
            print(
                f"srpo: error: Prefect's server at {PREFECT_API_URL.value()} has been unreachable for"
                f" {PATIENCE_SECONDS:.0f} s; finished stages are kept: run the same command again when it is back",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _check_server(address: str) -> None:
    shown = without_secrets(address)
    try:
        with get_client(sync_client=True) as client:
            if error := client.api_healthcheck():
                raise error
            client.read_flows(limit=1)  # the health check needs no credentials
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = "is it the right address?"
        if status in (401, 403):
            hint = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        raise NoServer(f"Prefect's server at {shown} answers {status}; {hint}") from None
    except httpx.HTTPError as error:
        hint = "start it or unset PREFECT_API_URL, see docs/how-to/servers.md"
        raise NoServer(f"Prefect's server at {shown} does not answer ({type(error).__name__}); {hint}") from None


def _is_unreachable() -> bool:
    # Prefect's own client, which uses API keys and proxies; its retries would take a minute
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
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
