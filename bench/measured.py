"""Commands as child processes, with their time, memory and traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
