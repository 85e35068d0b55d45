"""No result depends on the time of day: it is read only for MLflow's points and for what people are told."""

from __future__ import annotations

import re
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "srpo"
WALL_CLOCK = re.compile(r"time\.(time|strftime|localtime|gmtime|ctime)\b|datetime|from time import|\btoday\(|\bnow\(\)")
# launch: the stamp of a worker's error message; lock: since when a round is held; tracking: when a point was logged
ALLOWED = {"launch.py", "lock.py", "tracking.py"}


def test_the_wall_clock_is_read_nowhere_that_makes_results() -> None:
    found = {path.name for path in SOURCES.rglob("*.py") if WALL_CLOCK.search(path.read_text(encoding="utf-8"))}
    assert found <= ALLOWED
