"""Units of work of a stage: each writes one file.

A process that makes a unit holds a lock on it, which the kernel frees when the process ends, however it ends. So units
are dealt out as processes become free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from srpo.rounds import Round

Make = Callable[[Path], None]
"""Writes one unit's file, atomically. Units are told apart by their names: on another machine the folder differs."""

ATTEMPTS = 3


@dataclass(frozen=True)
class Units:
    """The units of a stage and how to make them.

    Attributes:
        stage: the command of `srpo` that runs this stage, for worker processes and messages.
        paths: the units' files, in a folder of the project that exists.
        load: loads what makes units, for a round whose root may be a copy of the project's on another machine. Entered
            at most once per process, and only if there is a unit to make. A module's function, or a partial of one
            with values that can be pickled.
        inputs: files and folders of the project that all units read.
        inputs_of: returns those that one unit reads besides.
        check: compares the inputs with their records, and raises a UserError. Called once, and only if there is a unit
            to make, in the process that others get their work from.
    """

    round: Round
    stage: str
    paths: Sequence[Path]
    load: Callable[[Round], AbstractContextManager[Make]]
    inputs: Sequence[Path] = ()
    inputs_of: Callable[[Path], Sequence[Path]] = lambda _: ()
    check: Callable[[], None] = lambda: None


def unfinished(units: Sequence[Path]) -> list[Path]:
    """Return the units whose files do not exist."""
    return [unit for unit in units if not unit.exists()]


def claimed(units: Sequence[Path]) -> Iterator[Path]:
    """Yield each unfinished unit that no other process is making, holding its lock until the next one is asked for."""
    from filelock import FileLock, Timeout

    for unit in unfinished(units):
        try:
            with FileLock(lock_file(unit), blocking=False):
                if not unit.exists():
                    yield unit
        except Timeout:
            continue


def lock_file(unit: Path) -> Path:
    """Return the lock that a process holds while it makes the unit."""
    return unit.with_name(f".{unit.name}.lock")
