"""A process of a cluster: holds a stage's models and makes the units that the driver gives it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from srpo.errors import UserError, environment_error_message
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.node_files import Manifest, NodeFiles, manifest
from srpo.storage.hashing import value_digest

PACKAGE = Path(__file__).parents[1]
COMPARED = ("torch", "diffusers", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Problem:
    """What keeps the stage from going on: bad input, or something else outside the code."""

    is_input: bool
    text: str


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray's id, and its IP address."""

    id: str
    address: str


@dataclass(frozen=True)
class Work:
    """What all processes of a stage need to know.

    Attributes:
        load: what `UnitMaker` enters, or a `Gang` runs.
        files: the inputs of all units; None with a shared disk.
        checkpoints: of a `Gang`: the pattern of the files that go to the driver.
    """

    load: Callable[..., Any]
    round: Round
    files: Manifest | None
    checkpoints: str = ""


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all machines, for results do not depend on the machine."""
    code = manifest(PACKAGE, PACKAGE.rglob("*.py"))
    found = {name: importlib.metadata.version(name) for name in COMPARED}
    return found | {"python": platform.python_version().rpartition(".")[0], "srpo": value_digest(code)[:12]}


def version_problem(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Return which versions differ from the driver's, or None."""
    different = [
        f"{name} {found.get(name)} (here {value})" for name, value in wanted.items() if found.get(name) != value
    ]
    return f"has {', '.join(different)}; install the same versions on all machines" if different else None


class NodeProcess:
    """Base of the classes of Ray actors; one is one process.

    Methods return a Problem instead of raising what a user can mend.
    """

    node: Node
    work: Work
    round: Round

    def __init__(self, wanted: Mapping[str, str]) -> None:
        """Take the versions of the driver, to compare them."""
        self._wanted = wanted

    def start(self, work: Work) -> tuple[Node, set[str]] | Problem:
        """Prepare for the work; return where this process is, and the digests of the files that it has to be sent."""
        import ray

        self.node = Node(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
        os.environ[distributed.NODE_VARIABLE] = self.node.address
        if work.round.params.runtime.device == "cuda":  # Ray sets one; read when torch is imported
            os.environ["OMP_NUM_THREADS"] = str(_cores_per_gpu())
        if problem := version_problem(self._wanted, versions()):
            return Problem(True, f"runtime.cluster: machine {self.node.address} {problem}")
        self.work = work
        self.round = work.round
        if work.files is None:
            return self.node, set()
        self._files = NodeFiles()
        self.round = replace(work.round, root=self._files.root)
        return self.node, self._files.missing(work.files)

    def receive(self, files: Mapping[str, Iterable[Any]]) -> Problem | None:
        """Keep the contents of files, by their digests."""
        import ray

        contents = {sha256: (ray.get(part) for part in parts) for sha256, parts in files.items()}
        return self.problem_of(lambda: self._files.add(contents)) if files else None

    def lay_out(self) -> None:
        """Put the inputs where the project has them, and make that the working directory, as it is of commands."""
        if self.work.files is not None:
            self._files.lay_out(self.work.files)
        if not self.round.root.is_dir():
            raise UserError(f"{self.round.root}: not there; runtime.cluster_storage: shared needs it on all machines")
        os.chdir(self.round.root)

    def problem_of(self, function: Callable[[], None]) -> Problem | None:
        """Call a function; return what a user can mend, in terms of the project's folder."""
        try:
            function()
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else environment_error_message(error)
            if message is None:
                raise
            text = message.replace(f"{self.round.root}/", "")
            return Problem(isinstance(error, UserError), f"{text} (on machine {self.node.address})")
        return None


class UnitMaker(NodeProcess):
    """Makes units."""

    def __init__(self, wanted: Mapping[str, str]) -> None:
        """Take the versions of the driver, to compare them."""
        super().__init__(wanted)
        self._make: Callable[[Path], None] | None = None
        self._warnings = _Warnings()
        logging.getLogger("srpo").addHandler(self._warnings)

    def make(
        self, name: str, own: Mapping[str, Iterable[Any]], received: Problem | None
    ) -> tuple[Problem | list[str], np.ndarray | None]:
        """Make one unit.

        Args:
            name: the unit's path relative to the project.
            own: contents of files that only this unit reads, by their relative paths.
            received: what `receive` returned.

        Returns:
            A problem, or the warnings of this unit; and the file's bytes, uint8, unless it stays where it is.
        """
        unit = self.round.root / name
        if problem := received or self.problem_of(lambda: self._make_with(unit, own)):
            return problem, None
        warnings = self._warnings.taken()
        if self.work.files is None:
            return warnings, None
        content = np.fromfile(unit, np.uint8)
        for path in (name, *own):
            (self.round.root / path).unlink()
        return warnings, content

    def _make_with(self, unit: Path, own: Mapping[str, Iterable[Any]]) -> None:
        import ray

        if self._make is None:
            self.lay_out()
            self._make = self.work.load(self.round).__enter__()  # left when the process is ended
        for name, parts in own.items():
            path = self.round.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for part in parts:
                    file.write(memoryview(ray.get(part)))
        unit.parent.mkdir(parents=True, exist_ok=True)
        self._make(unit)


def _cores_per_gpu() -> int:
    """Return this machine's cores divided by its GPUs."""
    import ray

    me = ray.get_runtime_context().get_node_id()
    gpus = next(node["Resources"].get("GPU", 1) for node in ray.nodes() if node["NodeID"] == me)
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(gpus)))


class _Warnings(logging.Handler):
    """Collects this package's warnings, which the driver logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def taken(self) -> list[str]:
        """Return the lines so far, which are forgotten."""
        lines, self._lines = self._lines, []
        return lines
