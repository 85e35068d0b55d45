"""Stages in units: each unit of work writes one file; finished files are kept, and processes share the others.

A process that makes a unit holds a lock on it, which the kernel frees when the process ends, however it ends. So units
are dealt out as processes become free, and a killed run repeats at most one unit per process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.runtime import distributed

if TYPE_CHECKING:
    from srpo.config.schema import RuntimeParams

Make = Callable[[Path], None]
"""Writes one unit's file, atomically."""

ATTEMPTS = 3


def make_units(
    units: Sequence[Path],
    command: Sequence[str],
    load: Callable[[], AbstractContextManager[Make]],
    runtime: RuntimeParams,
) -> None:
    """Make the units that do not exist yet; with `runtime.processes` above 1, in that many worker processes.

    Args:
        units: the files, in a folder that exists.
        command: arguments of `srpo` that run this stage in a worker, which calls this function with the same units.
        load: loads what makes a unit; entered at most once per process, and only if there is a unit to make.

    Raises:
        UserError: a unit's input is bad.
    """
    if distributed.is_parent(runtime) and unfinished(units):
        distributed.run(lambda: command, min(runtime.processes, len(unfinished(units))), attempts=ATTEMPTS)
    with ExitStack() as stack:
        make: Make | None = None
        for unit in claimed(units):
            if make is None:
                make = stack.enter_context(load())
            make(unit)
    if not distributed.is_worker():  # the folder may be published
        for unit in units:
            _lock(unit).unlink(missing_ok=True)


def unfinished(units: Sequence[Path]) -> list[Path]:
    """Return the units whose files do not exist."""
    return [unit for unit in units if not unit.exists()]


def claimed(units: Sequence[Path]) -> Iterator[Path]:
    """Yield each unfinished unit that no other process is making, holding its lock until the next one is asked for."""
    from filelock import FileLock, Timeout

    for unit in unfinished(units):
        try:
            with FileLock(_lock(unit), blocking=False):
                if not unit.exists():
                    yield unit
        except Timeout:
            continue


def _lock(unit: Path) -> Path:
    return unit.with_name(f".{unit.name}.lock")
