"""A real worker and deployment: a run cancelled, and a worker killed, in the middle of a stage."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter
from prefect.client.schemas.objects import FlowRun

from flows import concurrency
from srpo.runtime import fork_server, fork_server_process
from tests.flows.conftest import REPO, ran

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
workers: list[subprocess.Popen] = []


@pytest.fixture
def deployed(workspace: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace with the deployment `local` of prefect.yaml; the server's address is in the environment."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.setenv("SRPO_ROOT", str(workspace))
    monkeypatch.setenv("SRPO_RETRY_DELAY", "0")
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE)  # the flow's own fork server must end with it
    monkeypatch.setenv(fork_server.REQUEST_VARIABLE, "1")
    monkeypatch.setenv(fork_server_process.PRELOAD_VARIABLE, "dvc.cli dvc.repo dvc.commands.repro")
    (workspace / "flows").symlink_to(REPO / "flows")
    (workspace / "prefect.yaml").symlink_to(REPO / "prefect.yaml")
    concurrency.ensure_limit()
    prefect("work-pool", "create", "srpo-local", "--type", "process", "--overwrite")
    prefect("deploy", "--name", "local")
    yield workspace
    for worker in workers:  # what a failed test leaves
        worker.kill()
        worker.wait()


def prefect(*arguments: str) -> str:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_worker() -> psutil.Process:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "srpo-local"]
    with Path("worker.txt").open("a") as words:
        worker = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, start_new_session=True)
    workers.append(worker)
    return psutil.Process(worker.pid)


def run_deployment(**parameters) -> str:
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    return re.search(r"UUID: ([0-9a-f-]{36})", prefect("deployment", "run", "srpo-rounds/local", *given))[1]


def read_run(run: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def logs(run: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_logs(LogFilter(flow_run_id={"any_": [run]}), limit=200)
    return "\n".join(line.message for line in found)


def until(holds: Callable[[], object], seconds: float = 240):
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.5)
    assert found, Path("worker.txt").read_text()[-3000:]
    return found


def family(worker: psutil.Process, run: str) -> list[psutil.Process]:
    """Every process of a run whose stage hangs: the flow's, its warm server, dvc, the stage and the stage's child."""
    hanging = until(lambda: re.search(r"hanging (\d+) (\d+)", logs(run)))
    found = [psutil.Process(int(pid)) for pid in hanging.groups()] + worker.children(recursive=True)
    assert any("prefect.engine" in " ".join(process.cmdline()) for process in found)
    return found


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def end(worker: psutil.Process) -> None:
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)


def test_canceled_run_leaves_no_process(deployed: Path) -> None:
    (deployed / "trouble-evaluate-base").write_text("hang")
    worker = start_worker()
    run = run_deployment(rounds=["001"])
    processes = family(worker, run)
    prefect("flow-run", "cancel", run)
    until(lambda: read_run(run).state.is_cancelled())
    until(lambda: not left(processes), seconds=40)
    assert worker.is_running()
    (deployed / "trouble-evaluate-base").write_text("bad input")
    run = run_deployment(rounds=["001"])
    until(lambda: read_run(run).state.is_failed())
    until(lambda: not worker.children())  # it has said all by then
    end(worker)
    assert "params.yaml: seed: too odd" in read_run(run).state.message
    told = (deployed / "worker.txt").read_text() + logs(run)
    assert "Traceback" not in told, told[told.index("Traceback") - 1000 :]


def test_killed_worker_ends_its_stage(deployed: Path) -> None:
    trouble = deployed / "trouble-evaluate-base"
    trouble.write_text("hang")
    wanted = {"rounds": ["001"], "stages": ["base", "evaluate-base", "generate"]}
    worker = start_worker()
    processes = family(worker, run_deployment(**wanted))
    worker.kill()
    until(lambda: not left(processes), seconds=40)
    assert ran(deployed) == ["base@base", "evaluate@base"]
    trouble.unlink()
    worker = start_worker()
    run = run_deployment(**wanted)
    until(lambda: read_run(run).state.is_completed(), seconds=300)  # the killed flow's slot is its own for a minute
    end(worker)
    assert ran(deployed) == ["evaluate@base", "generate@001"]
