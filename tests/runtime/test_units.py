"""Units of work: finished ones are kept, processes share the others, and a killed one is repeated alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from srpo.runtime.units import claimed, unfinished


def paths(folder: Path, count: int = 8) -> list[Path]:
    return [folder / f"unit-{number}" for number in range(count)]


def work(folder: Path, name: str, seconds: float) -> None:
    for unit in claimed(paths(folder)):
        time.sleep(seconds)
        with (folder / "log").open("a") as log:
            log.write(f"{unit.name} {name}\n")
        unit.write_text("done")


def start(folder: Path, name: str, seconds: float) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, name, seconds))
    process.start()
    return process


def test_finished_units_are_kept(tmp_path: Path) -> None:
    paths(tmp_path)[3].write_text("kept")
    assert list(claimed(paths(tmp_path))) == [unit for unit in paths(tmp_path) if unit.name != "unit-3"]
    assert paths(tmp_path)[3].read_text() == "kept"


def test_a_fast_process_does_more_units(tmp_path: Path) -> None:
    processes = [start(tmp_path, "slow", 0.4), start(tmp_path, "fast", 0.02)]
    for process in processes:
        process.join(30)
    made = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for name, _ in made) == [unit.name for unit in paths(tmp_path)], "each once"
    workers = [worker for _, worker in made]
    assert workers.count("fast") > workers.count("slow") > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_frees_its_unit(tmp_path: Path, number: signal.Signals) -> None:
    killed = start(tmp_path, "killed", 0.2)
    while len(unfinished(paths(tmp_path))) > 5:
        time.sleep(0.01)
    os.kill(killed.pid or 0, number)
    killed.join(30)
    left = unfinished(paths(tmp_path))
    assert 4 <= len(left) <= 5
    assert list(claimed(paths(tmp_path))) == left
