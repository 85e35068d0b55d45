"""One function in several processes of a Ray cluster that compute together, such as a training.

All processes start anew when one of them or its node ends. The first one's files come back to the driver while it
works, so a restart continues from them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from srpo.rounds import Round
from srpo.runtime.cluster import PATIENCE_SECONDS, Inputs, give_up, remote_class
from srpo.runtime.node_process import NodeProcess, Problem, Work
from srpo.runtime.progress import OnStep
from srpo.runtime.ray_connection import connected
from srpo.runtime.units import ATTEMPTS
from srpo.storage.files import atomic_write, publish
from srpo.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
POLL_SECONDS = 2


@dataclass(frozen=True)
class Gang:
    """What the processes do.

    Attributes:
        stage: the stage's name, for messages.
        run: called in every process, with RANK and WORLD_SIZE in the environment; `on_step` reaches the driver's.
            A module's function, or a partial of one with values that can be pickled.
        inputs: returns the files and folders of the project that it reads; called for every attempt.
        checkpoints: glob pattern, relative to the project, of files from which a restart continues. The first process
            writes them.
        results: files and folders that the first process has written at the end.
    """

    round: Round
    stage: str
    run: Callable[[Round, OnStep], None]
    inputs: Callable[[], Sequence[Path]]
    checkpoints: str
    results: Sequence[Path]


def run_gang(gang: Gang, processes: int, on_step: OnStep) -> None:
    """Run the function in this many processes of `runtime.cluster`, until all end well, and publish its results.

    Raises:
        UserError: bad input, or no cluster.
        BlockedError: a node has an environment problem.
        SystemExit: ATTEMPTS attempts in succession ended without a new checkpoint.
    """
    with connected(gang.round.params.runtime):
        failures = 0
        while True:
            attempt = _Attempt(gang, processes, on_step)
            try:
                attempt.run()
                attempt.publish_results()
                return
            except (RayActorError, RayTaskError) as error:
                failures = 1 if attempt.checkpoints else failures + 1
                action = "giving up" if failures == ATTEMPTS else "restarting all"
                name = f"{gang.stage} {gang.round.key}"
                log.warning("%s: one of %d processes ended; %s", name, processes, action)
                if failures == ATTEMPTS:
                    if isinstance(error, RayTaskError):
                        raise
                    raise SystemExit(1) from None
            finally:
                attempt.end()


class _Attempt:
    """One start of all processes."""

    def __init__(self, gang: Gang, processes: int, on_step: OnStep) -> None:
        self._gang = gang
        self._on_step = on_step
        self._inputs = Inputs(gang.round, gang.inputs())
        self.checkpoints = 0
        actor, round = remote_class(Member, gang.round, 1, max_concurrency=2)
        self._members = [actor.remote(self._inputs.versions) for _ in range(processes)]
        self._work = ray.put(Work(gang.run, round, self._inputs.files, gang.checkpoints))

    def run(self) -> None:
        starts = [member.start.remote(self._work) for member in self._members]
        begun = time.monotonic()
        while len(ray.wait(starts, num_returns=len(starts), timeout=PATIENCE_SECONDS)[0]) < len(starts):
            if time.monotonic() - begun < 2 * PATIENCE_SECONDS:
                log.warning(
                    "%s %s: waiting for %d processes to start at once; the cluster has too few free GPUs or CPU cores"
                    " for runtime.processes",
                    *(self._gang.stage, self._gang.round.key, len(starts)),
                )
        received = []
        for member, result in zip(self._members, ray.get(starts), strict=True):
            if isinstance(result, Problem):
                give_up(result)
            received.append(self._inputs.send(member, result[1]))
        for problem in ray.get(received):
            if problem:
                give_up(problem)
        meeting = ray.get(self._members[0].meeting_point.remote())
        size = len(self._members)
        runs = [member.run.remote(rank, size, *meeting) for rank, member in enumerate(self._members)]
        while runs:
            ready, runs = ray.wait(runs, timeout=POLL_SECONDS)
            self._poll()
            for problem in ray.get(ready):
                if problem:
                    give_up(problem)
        self._poll()

    def publish_results(self) -> None:
        """Bring the results to their places in the project; with a shared disk they are there."""
        root = self._gang.round.root
        if self._inputs.files is None:
            return
        scratch = scratch_folder(root, f"{self._gang.stage}ed", self._gang.round.key)
        for result in self._gang.results:
            name = result.relative_to(root).as_posix()
            for part, content in ray.get(self._members[0].files.remote(name)).items():
                with atomic_write(scratch / name / part if part else scratch / name) as partial:
                    content.tofile(partial)
            publish(scratch / name, result)
        shutil.rmtree(scratch)

    def end(self) -> None:
        """End all processes."""
        for member in self._members:
            ray.kill(member)

    def _poll(self) -> None:
        root = self._gang.round.root
        steps, files, kept = ray.get(self._members[0].news.remote())
        for name, content in files.items():
            with atomic_write(root / name) as partial:
                content.tofile(partial)
            self.checkpoints += 1
        if files:  # the first process removes old ones
            for path in root.glob(self._gang.checkpoints):
                if path.relative_to(root).as_posix() not in kept:
                    path.unlink()
        for metrics, step in steps:
            self._on_step(metrics, step)


class Member(NodeProcess):
    """The class of Ray actors; one is one process. `news` is called while `run` works."""

    def __init__(self, wanted: Mapping[str, str]) -> None:
        """Take the versions of the driver, to compare them."""
        super().__init__(wanted)
        self._steps: list[tuple[dict[str, float], int]] = []
        self._sent: set[str] = set()

    def meeting_point(self) -> tuple[str, int]:
        """Return this machine's address and a free port."""
        with socket.socket() as free:
            free.bind((self.node.address, 0))
            return free.getsockname()

    def run(self, rank: int, size: int, address: str, port: int) -> Problem | None:
        """Run the function as one of several processes."""
        # a process sees its own GPU only, whose number is 0
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return self.problem_of(self._run)

    def news(self) -> tuple[list[tuple[dict[str, float], int]], dict[str, np.ndarray], list[str]]:
        """Return the steps and checkpoints that are new since the last call, and the names of all checkpoints."""
        steps, self._steps = self._steps, []
        if self.work.files is None:
            return steps, {}, []
        files = {}
        names = self._checkpoints()
        for name in names:
            path = self.round.root / name
            if name not in self._sent:
                with contextlib.suppress(FileNotFoundError):  # an old one, removed just now
                    files[name] = np.fromfile(path, np.uint8)
                    self._sent.add(name)
        return steps, files, names

    def files(self, name: str) -> dict[str, np.ndarray]:
        """Return the contents of a file, or of a folder's files by their names in it; that of a file is empty."""
        path = self.round.root / name
        paths = [path] if path.is_file() else sorted(path.rglob("*"))
        return {
            "" if part == path else part.relative_to(path).as_posix(): np.fromfile(part, np.uint8)
            for part in paths
            if part.is_file()
        }

    def _run(self) -> None:
        self.lay_out()
        # what came from the driver is no news
        self._sent = set(self._checkpoints())
        self.work.load(self.round, lambda metrics, step: self._steps.append((dict(metrics), step)))

    def _checkpoints(self) -> list[str]:
        """Return the names of all checkpoints, relative to the project."""
        root = self.round.root
        return sorted(path.relative_to(root).as_posix() for path in root.glob(self.work.checkpoints))
