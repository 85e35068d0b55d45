"""`python -m tests.support.journaled <journal> <srpo's arguments>`: the command, which tells of each unit it begins.

The journal is a file on a disk that all processes of a cluster have; a line is `<name> <pid>`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from srpo import cli
from srpo.rounds import Round
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Make, Units


@contextmanager
def journaled(load: Any, journal: Path, round: Round) -> Iterator[Make]:
    with load(round) as make:

        def make_and_tell(unit: Path) -> None:
            with journal.open("a") as file:
                file.write(f"{unit.name} {os.getpid()}\n")
            make(unit)

        yield make_and_tell


def main(journal: Path, argv: list[str]) -> int:
    from srpo.stages import evaluate, generate, score

    def make(units: Units) -> None:
        make_units(replace(units, load=partial(journaled, units.load, journal)))

    for stage in (generate, score, evaluate):
        stage.make_units = make
    return cli.run(argv)


if __name__ == "__main__":
    from tests.support import journaled as module  # not __main__, which processes of a cluster can't import from

    sys.exit(module.main(Path(sys.argv[1]), sys.argv[2:]))
