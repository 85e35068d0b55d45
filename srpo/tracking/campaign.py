"""Runs of a project's campaign in MLflow: find, create, restore, resume and delete them.

A campaign has one run with its curves over the rounds, and below it a run for each round and for base. All of them
carry the project's identity, so that projects and clones share a server. A round's run is identified by its weights,
and until there are any by the inputs of its training: a round that was trained again gets a new run, and the newest is
tagged `srpo.current`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.rounds import BASE, Round
from srpo.runtime.extras import require
from srpo.storage.hashing import value_digest
from srpo.storage.project import project_folder, project_identity
from srpo.tracking.connection import connect
from srpo.tracking.records import training_identity

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)

LOCK_SECONDS = 120
HEARTBEAT_SECONDS = 600  # a training that has logged nothing for so long has died
MAX_RUNS = 50_000
KIND, PROJECT, CAMPAIGN, ROUND = "srpo.kind", "srpo.project", "srpo.campaign", "srpo.round"
IDENTITY, CURRENT, HEARTBEAT = "srpo.identity", "srpo.current", "srpo.heartbeat"
CLONE = "srpo.clone"  # digest of the machine and folder that made the run
REPLACED = "srpo.replaced"  # a run that `delete` deleted
CAMPAIGN_NOTE = (
    "Every round of the campaign on held-out prompts. Step is the round's depth in the tree: 0 is base, 1 its children."
    " A metric such as `judge/002b` belongs to round 002b, a branch. The runs below hold each round's files."
)


@contextlib.contextmanager
def opened(params: Params, root: Path) -> Iterator[Campaign]:
    """Connect to MLflow, and keep other processes of this clone waiting meanwhile.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "tracking")
    from filelock import FileLock

    folder = project_folder(root) / ".srpo"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "mlflow.lock", timeout=LOCK_SECONDS):
        yield Campaign(params, root)


class Campaign:
    """The runs of one campaign of one project.

    Attributes:
        experiment: the experiment's id.
        project: the project's identity.
        is_copy: these rounds are in a temporary copy that DVC made for an experiment.
    """

    def __init__(self, params: Params, root: Path) -> None:
        folder = project_folder(root)
        self.client, self.experiment = connect(params.tracking, folder)
        self.project, self.name = project_identity(root), params.tracking.campaign
        self.is_copy = folder != root.resolve()
        self._clone = value_digest([platform.node(), str(folder)])[:12]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs of the campaign, oldest first, those in MLflow's bin included."""
        return self._search(PROJECT, self.project)

    def runs_of(self, key: str) -> list[Run]:
        """Return the runs of a round that are not deleted, the current one first, then newest first."""
        runs = [run for run in self.runs if run.data.tags.get(ROUND) == key and _is_active(run)]
        return sorted(runs, key=lambda run: (run.data.tags.get(CURRENT) == "true", run.info.start_time), reverse=True)

    @cached_property
    def parent(self) -> Run:
        """The campaign's own run, made or restored if needed."""
        if found := self.find("campaign"):
            return found
        name, others = self.name, [run.data.tags[PROJECT] for run in self._search(KIND, "campaign") if _is_active(run)]
        if others:
            name = f"{self.name} ({self.project})"
            log.warning(
                "MLflow: the campaign %s of project %s is in this experiment, too; %s's runs are kept apart by the tag"
                " %s; set tracking.campaign or tracking.experiment to another name to avoid confusion",
                *(self.name, others[0], self.project, PROJECT),
            )
        run = self._only(self._create(name, "campaign", {KIND: "campaign", "mlflow.note.content": CAMPAIGN_NOTE}))
        self.client.set_terminated(run.info.run_id, "FINISHED")
        return run

    def open_training(self, round: Round) -> Run:
        """Return a run for a training: that of the same training which died, or a new one."""
        identity = training_identity(round)
        run = self.find(identity) or self._create_for(round, identity)
        self.client.set_tag(run.info.run_id, HEARTBEAT, str(_now()))
        return run

    def find(self, identity: str) -> Run | None:
        """Return the run with this identity, restored if it was deleted, unless its training is going on elsewhere."""
        # in this clone the round's lock sees to it that no other training of the round is going on
        found = [
            run
            for run in self.runs
            if run.data.tags.get(IDENTITY) == identity
            and (not is_alive(run) or run.data.tags.get(CLONE) == self._clone)
        ]
        run = max(found, key=lambda run: (_is_active(run), run.data.tags.get(CURRENT) == "true"), default=None)
        if run and not _is_active(run):
            self.client.restore_run(run.info.run_id)
            log.warning("MLflow: %s (%s) was deleted in MLflow; restored it", run.info.run_name, run.info.run_id)
        return run

    def create(self, round: Round, identity: str) -> Run:
        """Create the run of a round's weights, or of base's."""
        return self._only(self._create_for(round, identity))

    def make_current(self, run: Run) -> None:
        """Tag a run as its round's current one."""
        for other in self.runs_of(run.data.tags[ROUND]):
            wanted = str(other.info.run_id == run.info.run_id).lower()
            if other.data.tags.get(CURRENT) != wanted:
                self.client.set_tag(other.info.run_id, CURRENT, wanted)

    def end_dead_runs(self) -> None:
        """Mark each run whose training has died as killed, by its heartbeat."""
        for run in self.runs:
            if run.info.status == "RUNNING" and _is_active(run) and not is_alive(run):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def delete(self) -> None:
        """Delete the campaign's runs, except living ones; each is named in the log."""
        for run in filter(_is_active, self.runs):
            if is_alive(run):
                log.warning("MLflow: kept %s (%s): it is training now", run.info.run_name, run.info.run_id)
                continue
            self.client.set_tag(run.info.run_id, REPLACED, "true")
            self.client.delete_run(run.info.run_id)
            log.warning("MLflow: deleted %s (%s)", run.info.run_name, run.info.run_id)
        del self.runs

    def _create_for(self, round: Round, identity: str) -> Run:
        tags = {KIND: "round", ROUND: round.key, "mlflow.parentRunId": self.parent.info.run_id}
        if experiment := os.environ.get("DVC_EXP_NAME"):
            tags["srpo.dvc_experiment"] = experiment
        return self._create(round.key if round.key == BASE else f"round {round.key}", identity, tags)

    def _create(self, name: str, identity: str, tags: dict[str, str]) -> Run:
        tags |= {PROJECT: self.project, CAMPAIGN: self.name, CLONE: self._clone, IDENTITY: identity}
        return self.client.create_run(self.experiment, run_name=name, tags=tags)

    def _only(self, new: Run) -> Run:
        """Return the oldest run with the identity of the new one; delete the new one, empty yet, if that is another.

        Two clones may create a run at the same time.
        """
        del self.runs
        identity = new.data.tags[IDENTITY]
        first = next(run for run in self.runs if _is_active(run) and run.data.tags.get(IDENTITY) == identity)
        if first.info.run_id != new.info.run_id:
            self.client.delete_run(new.info.run_id)
        return first

    def _search(self, tag: str, value: str) -> list[Run]:
        from mlflow.entities import ViewType

        # the campaign's name may contain quotes, so it is compared here and not by MLflow
        found = self.client.search_runs(
            [self.experiment], f"tags.`{tag}` = '{value}'", ViewType.ALL, max_results=MAX_RUNS
        )
        runs = [run for run in found if run.data.tags.get(CAMPAIGN) == self.name and REPLACED not in run.data.tags]
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def is_alive(run: Run) -> bool:
    """Return whether a run's training has logged anything of late, from whatever machine."""
    times = [point.timestamp for point in run.data.to_proto().metrics]
    beat = max(run.info.start_time, int(run.data.tags.get(HEARTBEAT, 0)), *times)
    return run.info.status == "RUNNING" and _now() - beat < HEARTBEAT_SECONDS * 1000


def _is_active(run: Run) -> bool:
    return run.info.lifecycle_stage == "active"


def _now() -> int:
    return int(time.time() * 1000)
