"""SIGKILL anywhere: what is published is whole or absent, and the next run ends as if nothing had happened.

A handful here; `make chaos` does two hundred over all stages.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.chaos import SHARED, rampage
from tests.faults.helpers import OUTPUTS, run, start, take_away
from tests.tracking.test_sync import story

CHEAP = ["base", "generate", "select", "train"]


def test_a_few_kills(project: Path) -> None:
    found = rampage(project, CHEAP, kills=4, seed=1)
    assert all(outcome.equal == outcome.kills + outcome.too_late for outcome in found.values())


@pytest.mark.slow
def test_kills_over_all_stages(project: Path) -> None:
    found = rampage(project, [*OUTPUTS, *SHARED], kills=30, seed=2)
    assert all(outcome.equal == outcome.kills + outcome.too_late for outcome in found.values())
    assert all(found[name].resumed for name in ("generate", "train"))


def records(root: Path) -> dict:
    """Return MLflow's records after `srpo track`."""
    code, output = run(root, "track")
    assert code == 0, output
    return story(root)


@pytest.mark.slow
def test_kills_leave_mlflow_records_whole(project: Path) -> None:
    params, chance = project / "params.yaml", random.Random(4)
    params.write_text(params.read_text().replace("uri: nowhere://", "uri: sqlite:///mlflow.db"))
    wanted, hits = records(project), 0
    assert {"base", "round 001"} < set(wanted)
    for _ in range(12):
        for command in (("train", "001"), ("track",)):
            began = time.monotonic()
            assert run(project, *command)[0] == 0
            took = time.monotonic() - began
            if command[0] == "train" and chance.random() < 0.5:
                take_away(project, "train")
            process = start(project, *command)
            process.join(chance.random() * took)
            process.kill()
            process.join()
            hits += process.exitcode == -signal.SIGKILL
        assert run(project, "train", "001")[0] == 0
        assert records(project) == wanted
    assert hits > 6
