"""SIGKILL anywhere: what is published is whole or absent, and the next run ends as if nothing had happened.

A handful here; `make chaos` does two hundred over all stages.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import rampage
from tests.faults.helpers import OUTPUTS

CHEAP = ["base", "generate", "select", "train"]


def test_a_few_kills(project: Path) -> None:
    found = rampage(project, CHEAP, kills=6, seed=1)
    assert sum(outcome.equal for outcome in found.values()) == 6
    assert sum(outcome.kills for outcome in found.values()) >= 3, "most came too late"


@pytest.mark.slow
def test_kills_over_all_stages(project: Path) -> None:
    found = rampage(project, list(OUTPUTS), kills=42, seed=2)
    assert all(outcome.equal == 6 for outcome in found.values())
    assert all(found[name].resumed for name in ("generate", "train"))
