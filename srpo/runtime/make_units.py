"""Stages in units: finished units are kept, and processes share the others.

Processes of one machine take units as they become free (`srpo.runtime.units.claimed`); in a cluster the driver deals
them out (`srpo.runtime.cluster`). A killed run repeats at most one unit per process.
"""

from __future__ import annotations

from contextlib import ExitStack

from srpo.config.schema import RuntimeParams
from srpo.runtime import distributed
from srpo.runtime.extras import require
from srpo.runtime.units import ATTEMPTS, Make, Units, claimed, lock_file, unfinished


def make_units(units: Units) -> None:
    """Make the units that do not exist yet: in a cluster, in several processes, or in this one (section `runtime`).

    Raises:
        UserError: a unit's input is bad.
    """
    runtime = units.round.params.runtime
    if unfinished(units.paths) and not distributed.is_worker():
        units.check()
    if is_shared(runtime) and (left := unfinished(units.paths)):
        if runtime.cluster:
            require("ray", "runtime.cluster")
            from srpo.runtime.cluster import make_units_in_cluster

            make_units_in_cluster(units)
        else:
            command = [units.stage, units.round.key]
            distributed.run(lambda: command, min(runtime.processes, len(left)), attempts=ATTEMPTS)
    with ExitStack() as stack:
        make: Make | None = None
        for unit in claimed(units.paths):
            if make is None:
                make = stack.enter_context(units.load(units.round))
            make(unit)
    if not distributed.is_worker():  # the folder may be published
        for unit in units.paths:
            lock_file(unit).unlink(missing_ok=True)


def is_shared(runtime: RuntimeParams) -> bool:
    """Return whether other processes make the units of this one."""
    return not distributed.is_worker() and (runtime.cluster is not None or runtime.processes > 1)
