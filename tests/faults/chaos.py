"""`python -m tests.faults.chaos`: kill every stage at seeded moments, run it again, compare the bytes.

A kill comes at a share of the stage's undisturbed time, or when the k-th file has appeared in its scratch folder, which
is where a half-done thing would be left. Before each one the stage's outputs are taken away, as DVC does, or left, as a
rerun by hand does. Right after it, what is under rounds/ must be whole or absent; after the next run, equal.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.helpers import OUTPUTS, build, command_of, contents, make_world, oddities, start, take_away, wait_for


@dataclass
class Outcome:
    """Of one stage: kills that hit it, runs that found finished parts afterwards, and runs that ended alike."""

    kills: int = 0
    too_late: int = 0
    resumed: int = 0
    equal: int = 0


class Stage:
    """One stage of a finished project, to be killed again and again."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name, self.outcome = root, name, Outcome()
        self.scratch = root / ".srpo" / "scratch"
        self.undisturbed, began = contents(root, name), time.monotonic()
        self.seconds = 0.0
        self._finish()
        self.seconds = time.monotonic() - began

    def kill(self, random: random.Random) -> None:
        """Take the outputs away or leave them, kill the command somewhere, check, run it, check."""
        fresh = random.random() < 0.7
        if fresh:
            take_away(self.root, self.name)
        process = start(self.root, *command_of(self.name))
        if random.random() < 0.5:
            at = time.monotonic() + random.random() * self.seconds
            process.join(max(0.0, at - time.monotonic()))
        else:
            known, count = self._files(), random.randint(1, 5)
            wait_for(lambda: len(self._files() - known) >= count, process)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.outcome.kills += 1
        else:
            self.outcome.too_late += 1
            assert process.exitcode == 0, f"{self.name} failed by itself"
        self.check_visible(whole_or_absent=True)
        done = {path: path.stat().st_mtime_ns for path in self._files() if path.suffix == ".parquet"}
        self._finish(done if self.name == "generate" else {})
        self.outcome.equal += 1

    def check_visible(self, *, whole_or_absent: bool = False) -> None:
        """Nothing half-written under rounds/, and every output there as it was before anything was killed."""
        assert not oddities(self.root), oddities(self.root)
        found = contents(self.root, self.name)
        for name in OUTPUTS[self.name]:
            there = self.root / "rounds" / name
            if whole_or_absent and not there.exists():
                continue
            files = [path for path in self.undisturbed if (self.root / path).is_relative_to(there)]
            assert {path for path in found if (self.root / path).is_relative_to(there)} == set(files), (
                f"{name}: partial"
            )
            assert all(found[path] == self.undisturbed[path] for path in files), f"{name}: other bytes"

    def _finish(self, done: dict[Path, int] | None = None) -> None:
        process: BaseProcess = start(self.root, *command_of(self.name), log=self.root / ".log")
        process.join()
        assert process.exitcode == 0, f"{self.name} after a kill: {(self.root / '.log').read_text()}"
        self.check_visible()
        if done:
            self.outcome.resumed += 1
            for path, stamp in done.items():
                out = self.root / "rounds" / "001" / "candidates" / path.name
                assert out.stat().st_mtime_ns == stamp, f"{path.name}: a finished shard was made again"
        elif "going on" in (self.root / ".log").read_text():
            self.outcome.resumed += 1

    def _files(self) -> set[Path]:
        prefix = "base" if self.name == "base" else f"{self.name}@"
        return {path for path in self.scratch.glob(f"{prefix}*/**/*") if path.is_file() and path.name[0] != "."}


def rampage(root: Path, names: Sequence[str], kills: int, seed: int, show: bool = False) -> dict[str, Outcome]:
    """Kill the stages of a finished project in turn, `kills` times in all.

    Raises:
        AssertionError: something was lost, half-written or made twice; the text says where.
    """
    chance = random.Random(seed)
    stages = [Stage(root, name) for name in names]
    for number in range(kills):
        stage = stages[number % len(stages)]
        stage.kill(chance)
        if show:
            print(f"\r{number + 1} of {kills}: {stage.name:10}", end="", file=sys.stderr, flush=True)
    return {stage.name: stage.outcome for stage in stages}


def main() -> None:
    """Build a project, kill, print the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="srpo-chaos-") as folder:
        root = Path(folder)
        make_world(root)
        found = rampage(build(root), list(OUTPUTS), options.kills, options.seed, show=True)
    table = Table("stage", "kills", "ended before", "resumed", "equal")
    for name, outcome in found.items():
        counts = (outcome.kills, outcome.too_late, outcome.resumed, outcome.equal)
        table.add_row(name, *map(str, counts))
    print(file=sys.stderr)
    Console().print(table)


if __name__ == "__main__":
    main()
