"""Commands as child processes, with their time, memory and traffic, and a plot of how these grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent
# a small process in between: until it executes its program, a child has its parent's memory, which would count
BETWEEN = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr).pid
anonymous = 0
while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG):
    status = dict(line.split(":") for line in open(f"/proc/{child}/status").read().splitlines())
    anonymous = max(anonymous, int(status.get("RssAnon", "0 kB").split()[0]))
    time.sleep(0.02)
wall = time.perf_counter() - start
io = dict(line.split(": ") for line in open(f"/proc/{child}/io").read().splitlines())
_, status, usage = os.wait4(child, 0)
print(json.dumps([status, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9,
                  int(io["rchar"]) / 1e6, int(io["wchar"]) / 1e6, anonymous * 1024 / 1e9]))
"""


class Usage(NamedTuple):
    """What a process used.

    Attributes:
        wall, cpu: seconds.
        memory: peak resident set in GB.
        read, written: MB, cached or not.
        anonymous: GB at peak without pages of mapped files, which the kernel takes back when memory is short.
    """

    wall: float
    cpu: float
    memory: float
    read: float
    written: float
    anonymous: float


def measured(module: list[str], root: Path) -> Usage:
    """Run `python -m <module and its arguments>` in `root`, and return what it used.

    Raises:
        SystemExit: the command failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, sys.executable, "-m", *module],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))},
        stdout=subprocess.PIPE,
        check=True,
    )
    status, *usage = json.loads(done.stdout)
    if status:
        raise SystemExit(f"{' '.join(module)}: failed")
    return Usage(*usage)


def plot_usage(
    candidates: Sequence[int],
    times: Mapping[str, Sequence[float]],
    found: Mapping[str, Sequence[Usage]],
    path: Path,
    *,
    unit: str,
) -> None:
    """Draw time and peak memory of every stage over the number of candidates; all axes but memory's are logarithmic.

    Args:
        times: by stage, a time for each number of candidates.
        found: by stage, what was used for each number of candidates.
        unit: of `times`, the label of their axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage, rows in found.items():
        left.plot(candidates, times[stage], marker="o", label=stage)
        right.plot(candidates, [row.memory for row in rows], marker="o", label=stage)
    left.set(xscale="log", yscale="log", xlabel="candidates", ylabel=unit)
    right.set(xscale="log", ylim=(0, None), xlabel="candidates", ylabel="GB at peak")
    left.legend()
    figure.savefig(path, dpi=110)
