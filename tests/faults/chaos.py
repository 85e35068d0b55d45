"""`python -m tests.faults.chaos`: kill every stage at seeded moments, run it again, compare the bytes.

A kill comes at a share of the stage's undisturbed time, or when the k-th file has appeared in its scratch folder, which
is where a half-done thing would be left. Of a stage in two processes the first is killed, which waits for the workers:
they must end with it. Before each one the stage's outputs are taken away, as DVC does, or left, as a
rerun by hand does. Right after it, what is under rounds/ must be whole or absent; after the next run, equal.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.faults.helpers import (
    OUTPUTS,
    build,
    command_of,
    contents,
    make_world,
    oddities,
    run,
    start,
    take_away,
    wait_for,
)

SHARED = ("generate x2", "train x2")


@dataclass
class Outcome:
    """Of one stage: kills that hit it, runs that found finished parts afterwards, and runs that ended alike."""

    kills: int = 0
    too_late: int = 0
    resumed: int = 0
    equal: int = 0


class Stage:
    """One stage of a finished project, to be killed again and again."""

    def __init__(self, root: Path, label: str) -> None:
        """`label` is the stage's name, with ` x2` behind it to have it run in two processes."""
        self.root, self.outcome = root, Outcome()
        self.name, _, self.processes = label.partition(" x")
        self.scratch = root / ".srpo" / "scratch"
        self._set_processes()
        # sums in another order: other bytes than one process makes, and always the same
        there = all((root / "rounds" / name).exists() for name in OUTPUTS[self.name])
        if self.processes or not there:  # evaluate replaces the folder that gate writes into
            run(root, *command_of(self.name))
        self.undisturbed, began = contents(root, self.name), time.monotonic()
        known, seen, process = self._files(), set(), self._start()
        while process.is_alive():
            seen |= self._files() - known
            time.sleep(0.002)
        self._check(process)
        self.seconds, self.files = time.monotonic() - began, max(1, len(seen))

    def _set_processes(self) -> None:
        params = self.root / "params.yaml"
        text = re.sub(r"\n  processes: \d", "", params.read_text())
        params.write_text(text.replace("runtime:\n", f"runtime:\n  processes: {self.processes or 1}\n"))

    def kill(self, random: random.Random) -> bool:
        """Take the outputs away or leave them, kill the command somewhere, check, run it, check.

        Returns:
            Whether it was killed before it ended.
        """
        self._set_processes()
        if random.random() < 0.7 or contents(self.root, self.name) != self.undisturbed:
            take_away(self.root, self.name)
        process = self._start()
        if random.random() < 0.5:
            process.join(random.random() * self.seconds)
        else:
            known, count = self._files(), random.randint(1, self.files)
            wait_for(lambda: len(self._files() - known) >= count, process)
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
            workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        assert not psutil.wait_procs(workers, timeout=20)[1], f"{self.name}: workers outlive it"
        hit = process.exitcode == -signal.SIGKILL
        assert hit or process.exitcode == 0, f"{self.name} failed by itself"
        self.outcome.kills += hit
        self.outcome.too_late += not hit
        self.check_visible(whole_or_absent=True)
        done = {path: path.stat().st_mtime_ns for path in self._files() if path.suffix == ".parquet"}
        self._finish(done if self.name == "generate" else {})
        self.outcome.equal += 1
        return hit

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

    def _start(self) -> BaseProcess:
        return start(self.root, *command_of(self.name), log=self.root / ".log")

    def _finish(self, done: dict[Path, int] | None = None) -> None:
        self._check(self._start(), done)

    def _check(self, process: BaseProcess, done: dict[Path, int] | None = None) -> None:
        process.join()
        assert process.exitcode == 0, f"{self.name} after a kill: {(self.root / '.log').read_text()}"
        self.check_visible()
        if done:
            self.outcome.resumed += 1
            for path, stamp in done.items():
                out = self.root / "rounds" / "001" / "candidates" / path.name
                assert out.stat().st_mtime_ns == stamp, f"{path.name}: a finished shard was made again"
        elif "resuming" in (self.root / ".log").read_text():
            self.outcome.resumed += 1

    def _files(self) -> set[Path]:
        prefix = "base" if self.name == "base" else f"{self.name}@"
        folders = [
            # what stood in the way of a publication is no part of the work
            folder for folder in self.scratch.glob(f"{prefix}*") if not folder.name.endswith(".replaced")
        ]  # fmt: skip
        # os.walk does not mind what goes away meanwhile
        walks = itertools.chain.from_iterable(map(os.walk, folders))
        return {Path(at, name) for at, _, names in walks for name in names if name[0] != "."}


def rampage(root: Path, names: Sequence[str], kills: int, seed: int, show: bool = False) -> dict[str, Outcome]:
    """Kill the stages of a finished project in turn, until that many kills hit one that ran.

    Raises:
        AssertionError: something was lost, half-written or made twice; the text says where.
    """
    chance, hits = random.Random(seed), 0
    stages = {name: Stage(root, name) for name in names}
    turns = itertools.cycle(stages.items())
    while hits < kills:
        name, stage = next(turns)
        hits += stage.kill(chance)
        if show:
            print(f"\r{hits} of {kills}: {name:12}", end="", file=sys.stderr, flush=True)
    return {name: stage.outcome for name, stage in stages.items()}


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
        found = rampage(build(root), [*OUTPUTS, *SHARED], options.kills, options.seed, show=True)
    table = Table("stage", "kills", "ended before", "resumed", "equal")
    for name, outcome in found.items():
        counts = (outcome.kills, outcome.too_late, outcome.resumed, outcome.equal)
        table.add_row(name, *map(str, counts))
    print(file=sys.stderr)
    Console().print(table)


if __name__ == "__main__":
    main()
