"""No result depends on the time of day: it is read only for MLflow's points and for what people are told."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest

from tests.faults.helpers import SERVER, command_of, contents, run_command, take_away

SOURCES = Path(__file__).parents[2] / "srpo"
WALL_CLOCK = re.compile(r"time\.(time|strftime|localtime|gmtime|ctime)\b|datetime|from time import|\btoday\(|\bnow\(\)")
# campaign: the time of a point; distributed: of an error message; journal: of a pick or vote; node_files: the age of
# copies on a node; round_lock: since when
ALLOWED = {"campaign.py", "distributed.py", "journal.py", "node_files.py", "round_lock.py"}


def test_results_do_not_read_the_clock() -> None:
    found = {path.name for path in SOURCES.rglob("*.py") if WALL_CLOCK.search(path.read_text(encoding="utf-8"))}
    assert found <= ALLOWED


def with_a_wild_clock(root: Path, stage: str, log: Path) -> None:
    hours = itertools.count(start=4_000_000_000, step=-3600)
    time.time = lambda: float(next(hours))
    time.time_ns = lambda: next(hours) * 10**9
    run_command(root, "srpo", tuple(command_of(stage)), log)


@pytest.mark.parametrize("stage", ["generate", "select", "train"])
def test_backward_clock_changes_nothing(project: Path, stage: str) -> None:
    undisturbed = contents(project, stage)
    take_away(project, stage)
    process = SERVER.Process(target=with_a_wild_clock, args=(project, stage, project / ".log"))
    process.start()
    process.join()
    assert process.exitcode == 0, (project / ".log").read_text()
    assert contents(project, stage) == undisturbed
