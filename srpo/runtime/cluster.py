"""Units of a stage on a Ray cluster: dealt out by the driver, made by processes that hold their models.

The driver is the command `srpo`. It asks Ray for processes (Ray actors) with one GPU each, or one CPU core where there
are no GPUs, and gives each the next unit as soon as it has finished one. Finished units come back through Ray's object
store and are written by the driver; with `runtime.cluster_storage: shared` they are written where they stay. The
processes end with the driver.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from srpo.errors import BlockedError, UserError, one_line
from srpo.rounds import Round
from srpo.runtime.node_files import Manifest, chunks, manifest
from srpo.runtime.node_process import Node, Problem, UnitMaker, Work, versions
from srpo.runtime.ray_connection import connected, is_alive, is_one_machine, uses_gpus
from srpo.runtime.units import ATTEMPTS, Units, unfinished
from srpo.storage.files import atomic_write

log = logging.getLogger(__name__)

# processes that are asked for and have not started: nodes that join later get work, and an autoscaler adds nodes
WAITING = 32
PATIENCE_SECONDS = 30


def make_units_in_cluster(units: Units) -> None:
    """Make the unfinished units on the nodes of `runtime.cluster`.

    A unit whose process or node ends is given to another process.

    Raises:
        UserError: bad input, no cluster, or a node with other versions.
        BlockedError: a node has an environment problem, such as a full disk.
        SystemExit: one unit ended its process ATTEMPTS times on nodes that are alive.
    """
    with connected(units.round.params.runtime):
        driver = _Driver(units)
        try:
            driver.run()
        finally:
            driver.end()


@dataclass(eq=False)
class _Process:
    """A process in the cluster, and what it does: it starts, or makes `unit`."""

    actor: Any
    unit: Path | None = None
    received: Any = None
    node: Node | None = None
    content: Any = None
    since: float = 0.0

    @property
    def address(self) -> str:
        """Where it is."""
        return self.node.address if self.node else "a node"


class _Driver:
    """Deals out the units of one stage."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._name = f"{units.stage} {units.round.key}"
        self._root = units.round.root
        self._todo = deque(unfinished(units.paths))
        self._calls: dict[Any, _Process] = {}
        self._failures: Counter[Path] = Counter()
        self._has_started = False
        self._failed_starts = 0
        self._inputs = Inputs(units.round, units.inputs)
        share = units.round.params.runtime.cluster_score_gpus if units.stage == "score" else 1
        self._actor, round = remote_class(UnitMaker, units.round, share)
        self._work = ray.put(Work(units.load, round, self._inputs.files))

    def run(self) -> None:
        """Deal out units until all are written."""
        started = time.monotonic()
        patient = True
        total = len(self._units.paths)
        with (
            logging_redirect_tqdm(),
            tqdm(total=total, initial=total - len(self._todo), desc=self._name, unit="unit", mininterval=2) as progress,
        ):
            while self._todo or any(process.unit for process in self._calls.values()):
                self._ask_for_processes()
                ready, _ = ray.wait(list(self._calls), timeout=1, fetch_local=False)
                for call in ready:
                    progress.update(self._finish(call))
                if patient and not ready and time.monotonic() - started > PATIENCE_SECONDS:
                    patient = False
                    if not any(process.node for process in self._calls.values()):
                        log.warning("%s: no free GPU or CPU core in the cluster yet; waiting", self._name)

    def end(self) -> None:
        """End all processes."""
        for process in self._calls.values():
            ray.kill(process.actor)

    def _ask_for_processes(self) -> None:
        """Have at most WAITING processes that have not started, and no more processes than units."""
        starting = sum(process.node is None for process in self._calls.values())
        in_work = sum(process.unit is not None for process in self._calls.values())
        needed = len(self._todo) + in_work - len(self._calls)
        for _ in range(min(needed, WAITING - starting)):
            process = _Process(self._actor.remote(self._inputs.versions))
            self._calls[process.actor.start.remote(self._work)] = process

    def _finish(self, call: Any) -> int:
        """Take the result of a call, and give its process the next unit; return the number of units written."""
        process = self._calls.pop(call)
        try:
            result = ray.get(call)
        except (RayActorError, RayTaskError) as error:
            self._replace(process, error)
            return 0
        if process.unit is None:
            return self._started(process, result)
        if isinstance(result, Problem):
            give_up(result)
        for line in result:
            log.warning("%s (on %s)", line, process.address)
        return self._made(process, process.unit)

    def _started(self, process: _Process, result: Any) -> int:
        if isinstance(result, Problem):
            give_up(result)
        process.node, missing = result
        self._has_started = True
        process.received = self._inputs.send(process.actor, missing)
        self._deal(process)
        return 0

    def _deal(self, process: _Process) -> None:
        """Give a process the next unit; without one it is let go, and Ray ends it."""
        if not self._todo:
            return
        process.unit = unit = self._todo.popleft()
        process.since = time.monotonic()
        own = {}
        if self._inputs.files is not None:
            own = {self._relative(path): _put(path) for path in self._units.inputs_of(unit)}
        call, process.content = process.actor.make.options(num_returns=2).remote(
            self._relative(unit), own, process.received
        )
        self._calls[call] = process

    def _made(self, process: _Process, unit: Path) -> int:
        """Take over the unit that a process has made, and write it; if its node is gone with it, it is made again.

        The process gets its next unit in between, so that a node that ends never takes two of them with it.
        """
        seconds = time.monotonic() - process.since
        try:
            array: np.ndarray | None = ray.get(process.content)
        except (ObjectLostError, RayActorError):
            self._todo.appendleft(unit)
            return 0
        self._deal(process)
        if array is not None:
            with atomic_write(unit) as partial:
                array.tofile(partial)
        log.info("%s: %s from %s in %.0f s", self._name, unit.name, process.address, seconds)
        return 1

    def _replace(self, process: _Process, error: Exception) -> None:
        """Give the unit of a process that failed to another one.

        Raises:
            RayTaskError: the code failed on the same unit ATTEMPTS times; it has the traceback.
        """
        ray.kill(process.actor)
        if process.unit is None:
            self._failed_starts += 1  # a node that ends takes those with it that it was starting
            if self._has_started or self._failed_starts < ATTEMPTS * min(WAITING, len(self._units.paths)):
                return
            raise UserError(f"runtime.cluster: no process starts on the cluster ({one_line(error):.200})")
        unit = process.unit
        self._todo.appendleft(unit)
        if isinstance(error, RayTaskError) or (process.node and is_alive(process.node)):
            self._failures[unit] += 1
        attempt = self._failures[unit]
        if attempt == ATTEMPTS and isinstance(error, RayTaskError):
            raise error
        action = "giving up" if attempt == ATTEMPTS else "another one makes it"
        log.warning("%s: the process on %s ended while it made %s; %s", self._name, process.address, unit.name, action)
        if attempt == ATTEMPTS:
            raise SystemExit(1)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def remote_class(process: type, round: Round, gpus: float, **options: Any) -> tuple[Any, Round]:
    """Return a Ray actor class that asks for this many GPUs, or a CPU core without any; and the round for it."""
    runtime = round.params.runtime
    on_gpus = uses_gpus(runtime)
    device = "cuda" if on_gpus else "cpu"
    params = round.params.model_copy(update={"runtime": runtime.model_copy(update={"device": device})})
    actor = ray.remote(num_cpus=1, num_gpus=gpus if on_gpus else 0, max_restarts=0, **options)(process)
    return actor, replace(round, params=params)


class Inputs:
    """What processes need from the driver: its versions, and files of the project unless the disk is shared."""

    def __init__(self, round: Round, paths: Sequence[Path]) -> None:
        """Hash the files in `paths`, files and folders."""
        runtime = round.params.runtime
        shared = runtime.cluster_storage == "shared" or is_one_machine(runtime)
        self.versions = versions()
        self.files: Manifest | None = None if shared else manifest(round.root, paths)
        self._paths = {sha256: round.root / name for name, sha256 in (self.files or {}).items()}
        self._sent: dict[str, list[Any]] = {}

    def send(self, actor: Any, missing: set[str]) -> Any:
        """Send the contents with these digests to a process; each is put into the object store once.

        Returns:
            A reference to None, or to the problem that the process had with them.
        """
        for sha256 in missing - self._sent.keys():
            self._sent[sha256] = _put(self._paths[sha256])
        return actor.receive.remote({sha256: self._sent[sha256] for sha256 in missing})


def _put(path: Path) -> list[Any]:
    return [ray.put(np.asarray(chunk)) for chunk in chunks(path)]


def give_up(problem: Problem) -> None:
    """Raise what a process reported."""
    raise (UserError if problem.is_input else BlockedError)(problem.text)
