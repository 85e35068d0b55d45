"""Prefect's server or the DVC remote away in the middle of a round: it completes, or ends cleanly and goes on later."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.errors import StageDied
from flows.rounds import srpo_rounds
from flows.stages import reproduce
from srpo.runtime import fork_server, fork_server_process
from tests.flows.conftest import BUCKET, ran, stages
from tests.flows.test_rounds import is_gone, run_flow
from tests.support.proxy import Proxy
from tests.support.servers import free_port, prefect_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BASE = ["base@base", "evaluate@base"]


@pytest.fixture(scope="module")
def prefect_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy before a Prefect server with a database of its own."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with prefect_server(folder, port, **environment), Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def project(workspace: Path, prefect_line: Proxy, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{prefect_line.port}/api")
    monkeypatch.setenv("SRPO_SERVER_PATIENCE", "20")
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE)  # the flow's own fork server must end with it
    monkeypatch.setenv(fork_server.REQUEST_VARIABLE, "1")
    monkeypatch.setenv(fork_server_process.PRELOAD_VARIABLE, "dvc.cli dvc.repo dvc.commands.repro")
    prefect_line.down = False
    return workspace


def fall_in(flow: subprocess.Popen, stage: str, line: Proxy) -> list[psutil.Process]:
    """Cut the line when the stage starts; the flow's processes at that moment."""
    next(said for said in flow.stdout if f"Running stage '{stage}'" in said)
    line.fall()
    return psutil.Process(flow.pid).children(recursive=True)


def test_absence_of_prefect_is_waited_out(project: Path, prefect_line: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPO_SERVER_PATIENCE", "300")
    (project / "trouble-evaluate-base").write_text("linger")
    flow = run_flow("--round", "001")
    fall_in(flow, "evaluate-base", prefect_line)
    # longer than Prefect retries by itself
    threading.Timer(90, lambda: setattr(prefect_line, "down", False)).start()
    told = flow.stdout.read()
    assert flow.wait(60) == 0, told[-3000:]
    assert ran(project) == BASE + stages("001")


def test_flow_ends_without_prefect_and_is_rerun(project: Path, prefect_line: Proxy) -> None:
    (project / "trouble-evaluate-base").write_text("linger")
    flow = run_flow("--round", "001")
    family = fall_in(flow, "evaluate-base", prefect_line)
    told = flow.stdout.read()
    assert flow.wait(120) == 1, told[-3000:]
    (line,) = [line for line in told.splitlines() if line.startswith("srpo: error: ")]
    assert "has been unreachable for 20 s; finished stages are kept" in line
    end = time.monotonic() + 20
    while not all(map(is_gone, family)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [process for process in family if not is_gone(process)] == []
    assert ran(project) == BASE
    prefect_line.down = False
    flow = run_flow("--round", "001")
    told = flow.stdout.read()
    assert flow.wait(60) == 0, told[-3000:]
    assert ran(project) == stages("001")


@pytest.fixture
def remote(workspace: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server that is the default remote."""
    monkeypatch.setattr(reproduce, "retry_delay_seconds", [0, 0])
    with Proxy(int(s3.rpartition(":")[2])) as proxy:
        for words in (
            ("add", "-q", "--default", "store", f"s3://{BUCKET}/store"),
            ("modify", "-q", "store", "endpointurl", f"http://127.0.0.1:{proxy.port}"),
        ):
            subprocess.run([sys.executable, "-m", "dvc", "remote", *words], check=True)
        yield proxy


def in_sync(*targets: str) -> bool:
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "-c", *targets], capture_output=True, text=True)
    return "in sync" in done.stdout


def test_slow_remote_with_lost_answers(workspace: Path, prefect_server, remote: Proxy) -> None:
    remote.delay, remote.loses = 0.05, lambda number: number % 7 == 0
    srpo_rounds(rounds=["001"], push=True)
    remote.delay, remote.loses = 0.0, lambda number: False
    assert ran(workspace) == BASE + stages("001")
    assert in_sync("base", "evaluate-base", *stages("001"))


def test_unreachable_remote(workspace: Path, prefect_server, remote: Proxy) -> None:
    remote.down = True
    with pytest.raises(StageDied, match=r"^(push|pull) (of|for) base: "):
        srpo_rounds(rounds=["001"], push=True)
    assert ran(workspace) == ["base@base"], "made again for each try to push it"
    remote.down = False
    srpo_rounds(rounds=["001"], push=True)
    assert ran(workspace) == ["evaluate@base", *stages("001")]
    assert in_sync("base", "evaluate-base", *stages("001"))
