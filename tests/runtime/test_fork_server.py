"""The fork server: its commands behave as in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from srpo.runtime import fork_server, fork_server_process, processes

# a stand-in for srpo.cli: the server is under test, not the stages
STUB = """
import os, subprocess, sys, time
def run(argv):
    if argv[0] == "show":
        print("out", os.getcwd(), os.environ.get("FLAVOUR"), argv[1:])
        print("err", file=sys.stderr)
        return int(argv[1])
    if argv[0] == "raise":
        raise RuntimeError("broken")
    if argv[0] == "die":
        os.kill(os.getpid(), 9)
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stub = tmp_path / "stub" / "srpo"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "cli.py").write_text(STUB)
    (stub / "runtime").mkdir()
    (stub / "runtime" / "__init__.py").write_text("")
    for module in (fork_server, fork_server_process, processes):
        (stub / "runtime" / Path(module.__file__).name).write_text(Path(module.__file__).read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv(fork_server_process.PRELOAD_VARIABLE, "srpo.cli")
    monkeypatch.chdir(tmp_path)
    with fork_server.running():
        yield


def client(*argv: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "srpo.runtime.fork_server", "srpo", *argv], **pipes | options)


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_streams_folder_environment_and_exit_code(server, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    process = client("show", "7", cwd=tmp_path / "elsewhere", env=os.environ | {"FLAVOUR": "plum"})
    out, err = process.communicate(timeout=20)
    assert out.strip() == f"out {tmp_path / 'elsewhere'} plum ['7']"
    assert err.strip() == "err" and process.returncode == 7


def test_exceptions_and_kills_are_reported(server) -> None:
    broken = client("raise")
    assert "RuntimeError: broken" in broken.communicate(timeout=20)[1] and broken.returncode == 1
    died = client("die")
    died.communicate(timeout=20)
    assert died.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_command_and_its_children(server, number) -> None:
    process = client("wait")
    grandchild = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=20)
    assert gone(grandchild)


def test_everything_ends_with_the_driver(server, tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom srpo.runtime import fork_server\nwith fork_server.running():\n"
        " print(os.environ['SRPO_FORK_SERVER'], flush=True)\n time.sleep(60)"
    )
    environ = {name: value for name, value in os.environ.items() if name != fork_server.SOCKET_VARIABLE}
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)
    socket = driver.stdout.readline().strip()
    command = client("wait", env=environ | {fork_server.SOCKET_VARIABLE: socket})
    grandchild = int(command.stdout.readline())
    server_process = psutil.Process(driver.pid).children()[0].pid
    driver.kill()
    driver.wait()
    assert gone(server_process) and gone(grandchild)
    command.communicate(timeout=20)
    assert command.returncode != 0


def test_submit_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE, raising=False)
    assert fork_server.submit(["srpo", "version"]) is None
    monkeypatch.setenv(fork_server.SOCKET_VARIABLE, "/nonexistent/socket")
    assert fork_server.submit(["srpo", "version"]) is None


def test_it_runs_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE, raising=False)
    monkeypatch.setenv(fork_server_process.PRELOAD_VARIABLE, "json")
    for value in ("", "1"):
        monkeypatch.setenv(fork_server.REQUEST_VARIABLE, value)
        with fork_server.if_requested():
            assert (fork_server.SOCKET_VARIABLE in os.environ) == bool(value)


def test_commands_wait_for_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(3)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(fork_server.__file__).parents[2]}")
    monkeypatch.setenv(fork_server_process.PRELOAD_VARIABLE, "slow_import json")
    monkeypatch.delenv(fork_server.SOCKET_VARIABLE, raising=False)
    with fork_server.running():
        assert "Usage" in client("--help").communicate(timeout=60)[0]
