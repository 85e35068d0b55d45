"""A whole round: the flow against the same work in one naive script.

    python -m bench.round [--prompts N] [--repeats 1]

Run it in the project's folder with its data. Both start as commands on a fresh copy of the project: `python -m
flows.rounds --round 001`, with Prefect's server, DVC, MLflow, reports and base's evaluation; and bench.naive_round,
which samples, scores, trains on and evaluates the same numbers of images with the same settings, without records.
`load` is the time of imports: once in the script; in the flow, until the first stage. --warm runs the flow with its
fork server. --prompts takes only the first N prompts of both files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.prompts import cut_prompts

KEY = "001"
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "rounds",
    ".srpo",
    "tmp",
    "cache",
    "mlflow.db*",
    "mlartifacts",
    "dvc.lock",
    "__pycache__",
    ".*_cache",
)
PARTS = {"base": "load", "evaluate-base": "evaluate base", "score": "score, select", "select": "score, select"}


def fresh_copy(project: Path, root: Path, prompts: int | None) -> None:
    """Copy the project without its outputs, and cut its prompt files to `prompts` lines."""
    shutil.copytree(project, root, ignore=LEFT_OUT)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    if prompts:
        for path in (root / "data" / "prompts").glob("*.jsonl"):
            cut_prompts(path, path, prompts)


def run(command: list[str], root: Path, on_line: Callable[[str], None]) -> float:
    """Run a command in `root` and return its wall seconds; `on_line` is called with each line of its output."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    start, lines = time.perf_counter(), []
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in child.stdout:
        lines.append(line)
        on_line(line)
    if child.wait():
        raise SystemExit(f"{' '.join(command)}: exit status {child.returncode}\n{''.join(lines[-20:])}")
    return time.perf_counter() - start


def by_flow(root: Path, warm: bool) -> dict[str, float]:
    """Return seconds by part of the flow. A part lasts until DVC starts the next stage."""
    seconds: dict[str, float] = {}
    part, since = "load", time.perf_counter()

    def on_line(line: str) -> None:
        nonlocal part, since
        if stage := re.search(r"Running stage '([\w-]+)(@\w+)?'", line):
            now = time.perf_counter()
            seconds[part] = seconds.get(part, 0.0) + now - since
            part, since = PARTS.get(stage[1], stage[1]), now

    run(["flows.rounds", "--round", KEY, *(["--warm"] if warm else [])], root, on_line)
    seconds["report, MLflow, end"] = seconds.pop("report", 0.0) + time.perf_counter() - since
    return seconds


def by_script(root: Path) -> dict[str, float]:
    """Return seconds by part of the naive script."""
    lines: list[str] = []
    total = run(["bench.naive_round", str(root / "naive")], root, lines.append)
    seconds = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    seconds["load"] += total - sum(seconds.values())
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    seconds: dict[str, list[dict[str, float]]] = {"naive script": [], "flow": []}
    load = os.getloadavg()[0]
    for _ in range(arguments.repeats):
        for name, measure in (("naive script", by_script), ("flow", partial(by_flow, warm=arguments.warm))):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder) / "project"
                fresh_copy(Path.cwd(), root, arguments.prompts)
                seconds[name].append(measure(root))
    naive, flow = (min(runs, key=lambda parts: sum(parts.values())) for runs in seconds.values())
    table = Table(title=f"base and round {KEY}; seconds, best of {arguments.repeats}; load before {load:.1f}")
    for column in ("part", "naive script", "flow", "times as fast"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in {**naive, **flow}:
        both = part in naive and part in flow
        cells = [f"{one[part]:.1f}" if part in one else "" for one in (naive, flow)]
        table.add_row(part, *cells, f"{naive[part] / flow[part]:.2f}" if both else "")
    totals = sum(naive.values()), sum(flow.values())
    table.add_row("in all", *(f"{total:.1f}" for total in totals), f"{totals[0] / totals[1]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
