"""SIGKILL anywhere: what is published is whole or absent, and the next run ends as if nothing had happened.

A handful here; `make chaos` does two hundred over all stages.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import SHARED, rampage
from tests.faults.helpers import OUTPUTS

CHEAP = ["base", "generate", "select", "train"]


def test_a_few_kills(project: Path) -> None:
    found = rampage(project, CHEAP, kills=4, seed=1)
    assert all(outcome.equal == outcome.kills + outcome.too_late for outcome in found.values())


@pytest.mark.slow
def test_kills_over_all_stages(project: Path) -> None:
    found = rampage(project, [*OUTPUTS, *SHARED], kills=30, seed=2)
    assert all(outcome.equal == outcome.kills + outcome.too_late for outcome in found.values())
    assert all(found[name].resumed for name in ("generate", "train"))
