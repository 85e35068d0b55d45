"""Commands as child processes, with their time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# a small process between: until it is replaced by its program, a child's memory is its parent's, and counts
BETWEEN = """
import json, os, subprocess, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stdout=sys.stderr).pid, 0)
print(json.dumps([status, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6]))
"""


def measured(module: list[str], root: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, and peak resident set in GB, of `python -m <module and its arguments>` in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, sys.executable, "-m", *module],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    status, wall, cpu, memory = json.loads(done.stdout)
    if status:
        raise SystemExit(f"{' '.join(module)}: died")
    return wall, cpu, memory
