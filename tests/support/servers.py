"""Real servers of MLflow and Prefect as processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], health: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A server as a process group, from its first healthy answer to its end."""
    words = folder / f"{Path(command[2]).name}-{time.monotonic_ns()}.log"
    with words.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=os.environ | environment, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(health, trust_env=False).is_success:
                    break
            assert process.poll() is None and time.monotonic() < end, words.read_text()[-2000:]
            time.sleep(0.1)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def mlflow_server(folder: Path, port: int, store: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    # the part that runs jobs for language models is of no use here, and three more processes
    return serving(command, f"http://127.0.0.1:{port}/health", folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")


def prefect_server(folder: Path, port: int, **environment: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
    where = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", *where]
    return serving(command, f"http://127.0.0.1:{port}/api/ready", folder, **environment)
