"""Units that sleep instead of computing, for tests and benchmarks of how work is dealt out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from srpo.config.loader import load_params
from srpo.errors import UserError
from srpo.rounds import Round
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Units


def sleepers(
    round: Round, count: int, seconds: float, journal: Path, bad: int | None = None, processes: int = 1
) -> Units:
    """Return units that take this long; each writes its name and its input, and a line to `journal`.

    Args:
        journal: a file on a disk that all processes have; a line is `<name> <pid>`.
        bad: the number of a unit whose input is bad.
        processes: a unit ends only when so many have begun one, or after a minute.
    """
    scratch = round.root / ".srpo" / "scratch" / "sleep"
    scratch.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (round.root / f"input-{number}.txt").write_text(f"input of {number}")
    paths = [scratch / f"unit-{number}" for number in range(count)]
    return Units(
        round,
        "sleep",
        paths,
        partial(load, seconds, journal, bad, processes),
        [round.root / "params.yaml"],
        lambda unit: [round.root / f"input-{unit.name.removeprefix('unit-')}.txt"],
    )


@contextmanager
def load(
    seconds: float, journal: Path, bad: int | None, processes: int, round: Round
) -> Iterator[Callable[[Path], None]]:
    params = (round.root / "params.yaml").read_bytes()

    def make(unit: Path) -> None:
        number = unit.name.removeprefix("unit-")
        own = round.root / f"input-{number}.txt"
        if number == str(bad):
            raise UserError(f"{own}: bad")
        with journal.open("a") as file:
            file.write(f"{unit.name} {os.getpid()}\n")
        end = time.monotonic() + 60
        while (
            len({line.split()[1] for line in journal.read_text().splitlines()}) < processes and time.monotonic() < end
        ):
            time.sleep(0.05)
        time.sleep(seconds)
        unit.write_bytes(own.read_bytes() + params)

    yield make


def _processes(journal: Path) -> int:
    return len({line.split()[1] for line in journal.read_text().splitlines()})


if __name__ == "__main__":  # <cluster> <journal> <count> <seconds>: units in this folder's project, as a command
    cluster, journal, count, seconds = sys.argv[1:]
    params = load_params()
    runtime = params.runtime.model_copy(update={"cluster": cluster})
    round = Round.of(params.model_copy(update={"runtime": runtime}), Path.cwd(), "001")
    try:
        make_units(sleepers(round, int(count), float(seconds), Path(journal)))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
