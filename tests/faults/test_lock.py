"""Two commands on one round: the second names the first. Other rounds are free, and so is a killed holder's round."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from srpo.errors import BlockedError
from srpo.rounds import RoundFiles
from srpo.runtime import distributed
from srpo.runtime.round_lock import lock_round
from tests.faults.helpers import SERVER, contents, ended, run, start, take_away, wait_for


def hold(root: Path, key: str) -> None:
    with lock_round(RoundFiles(root, key), "train"):
        (root / f"held-{key}").touch()
        signal.pause()


def test_second_command_names_the_holder(project: Path) -> None:
    before = contents(project, "select")
    holder = SERVER.Process(target=hold, args=(project, "001"))
    holder.start()
    with ended(holder):
        assert wait_for((project / "held-001").exists, holder)
        code, told = run(project, "select", "001")
        assert code == 1 and "Traceback" not in told
        who = f"process {holder.pid} on host {socket.gethostname()} (srpo train 001, since "
        assert f"srpo: error: rounds/001 is locked by {who}" in told and "wait or stop that process" in told
        assert contents(project, "select") == before
        with lock_round(RoundFiles(project, "002"), "generate"):  # another round is free
            pass
    code, told = run(project, "select", "001")  # it was killed, and the kernel freed the lock
    assert code == 0, told
    assert contents(project, "select") == before


def test_two_commands_started_together(project: Path) -> None:
    before = contents(project, "generate")
    take_away(project, "generate")
    logs = [project / "one.log", project / "two.log"]
    both = [start(project, "generate", "001", log=log) for log in logs]
    for process in both:
        process.join()
    codes, told = [process.exitcode for process in both], [log.read_text() for log in logs]
    assert 0 in codes and set(codes) <= {0, 1}, told
    assert all("is locked by" in text for code, text in zip(codes, told, strict=True) if code == 1)
    assert contents(project, "generate") == before


def test_workers_share_their_parents_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo.runtime.round_lock.TIMEOUT_SECONDS", 0)
    with lock_round(RoundFiles(tmp_path, "001"), "train"):
        with (
            pytest.raises(BlockedError, match=f"process {os.getpid()} on host"),
            lock_round(RoundFiles(tmp_path, "001"), "train"),
        ):
            pass
        monkeypatch.setenv(distributed.PARENT_VARIABLE, str(os.getpid()))
        with lock_round(RoundFiles(tmp_path, "001"), "train"):
            pass
    assert not list((tmp_path / ".srpo").glob("*.txt"))
