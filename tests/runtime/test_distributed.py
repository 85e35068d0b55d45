"""Many processes: the same candidates, whatever dies on the way, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from srpo.config.loader import load_params
from srpo.rounds import Round, RoundFiles
from srpo.stages.base import pin_base
from srpo.stages.generate import generate

REPO = Path(__file__).parents[2]


@pytest.fixture
def project(world: Path) -> Path:
    """Four shards of one prompt each, to be made by two processes; base is pinned."""
    text = (world / "params.yaml").read_text()
    text = text.replace("prompts_per_shard: 2", "prompts_per_shard: 1")
    (world / "params.yaml").write_text(text.replace("runtime:\n", "runtime:\n  processes: 2\n"))
    pin_base(Round.of(load_params(), world, "base"))
    return world


def start(project: Path) -> subprocess.Popen:
    environ = os.environ | {"PYTHONPATH": str(REPO), "SRPO_FORK_SERVER": "/nowhere"}
    command = [sys.executable, "-m", "srpo", "generate", "001"]
    return subprocess.Popen(command, cwd=project, env=environ, stderr=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def finished_shards(project: Path) -> dict[str, int]:
    found = (project / ".srpo" / "scratch").glob("generate@001-*/shard-*.parquet")
    return {path.name: path.stat().st_mtime_ns for path in found}


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_worker_changes_nothing(project: Path) -> None:
    process = start(project)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 2)
    time.sleep(1)  # let them become workers
    victim = psutil.Process(process.pid).children()[0]
    victim.suspend()  # so that it is not through by itself before it is killed
    wait_for(lambda: finished_shards(project))
    done = finished_shards(project)
    victim.kill()
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("SIGKILL") == 1 and "restarting all (attempt 1 of 3)" in told
    candidates = RoundFiles(project, "001").candidates
    kept = {name: (candidates / name).stat().st_mtime_ns for name in done}
    assert kept == done, "a finished shard was made again"
    many = content(candidates)
    generate(Round.of(load_params(), project, "001"))
    assert many == content(candidates)
    assert len(many) == 4


@pytest.mark.slow
def test_bad_input_in_a_worker_is_reported_once(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("base: data/base", "base: data/judge"))
    process = start(project)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2
    assert told.count("srpo: error: ") == 1 and told.startswith(
        "srpo: error: model.base: can't load 'data/judge' as an SDXL pipeline: "
    )
    assert len(told.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_worker_outlives_its_parent(project: Path, number: signal.Signals, code: int) -> None:
    process = start(project)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 2)
    time.sleep(1)  # let them become workers
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not psutil.wait_procs(workers, timeout=30)[1]
