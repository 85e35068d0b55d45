"""Runs of a project's campaign in MLflow: find, create, restore, resume and delete them.

A campaign has one run with its curves over the rounds, and below it a run for each round and for base. All of them
carry the project's identity, so that projects and clones share a server. A round's run is identified by its weights: a
round that was trained again gets a new run, and the newest is tagged `srpo.current`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

LOCK_SECONDS = 120
HEARTBEAT_SECONDS = 600  # a training that has logged nothing for so long has died
MAX_RUNS = 50_000
KIND, PROJECT, CAMPAIGN, ROUND = "srpo.kind", "srpo.project", "srpo.campaign", "srpo.round"
IDENTITY, TRAINING, CURRENT, HEARTBEAT = "srpo.identity", "srpo.training", "srpo.current", "srpo.heartbeat"
CLONE = "srpo.clone"  # digest of the machine and folder that made the run
REPLACED = "srpo.replaced"  # a run that `delete` deleted
CAMPAIGN_NOTE = (
    "Every round of the campaign on held-out prompts. Step is the round's depth in the tree: 0 is base, 1 its children."
    " A metric such as `judge/002b` belongs to round 002b, a branch. Judges, FID, KID and diversity decide; a rise of"
    " the selecting reward alone proves little. The runs below this one hold each round's images and report."
)


@contextlib.contextmanager
def opened(params: Params, root: Path) -> Iterator[Campaign]:
    """Connect to MLflow, and keep other processes of this clone waiting meanwhile.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "tracking")
    from filelock import FileLock

    folder = project_folder(root)
    (folder / ".srpo").mkdir(exist_ok=True)
    with FileLock(folder / ".srpo" / "mlflow.lock", timeout=LOCK_SECONDS):
        client, uri, experiment = connect(params.tracking, folder)
        is_copy = folder != root.resolve()
        yield Campaign(client, uri, experiment, project_identity(root), params.tracking.campaign, is_copy)


@dataclass
class Campaign:
    """The runs of one campaign of one project.

    Attributes:
        uri: MLflow's address.
        experiment: the experiment's id.
        project: the project's identity.
        name: the campaign's name.
        is_copy: these rounds are in a temporary copy that DVC made for an experiment.
    """

    client: MlflowClient
    uri: str
    experiment: str
    project: str
    name: str
    is_copy: bool = False

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
        if found := [run for run in self.runs if run.data.tags[KIND] == "campaign"]:
            return self._pick(found)
        others = [run.data.tags[PROJECT] for run in self._search(KIND, "campaign") if _is_active(run)]
        name = self.name
        if others:
            name = f"{self.name} ({self.project})"
            log.warning(
                "MLflow: the campaign %s of project %s is in this experiment, too; %s's runs are kept apart by the tag"
                " %s; set tracking.campaign or tracking.experiment to another name to avoid confusion",
                *(self.name, others[0], self.project, PROJECT),
            )
        run = self._create(name, "campaign", {KIND: "campaign", "mlflow.note.content": CAMPAIGN_NOTE})
        self.client.set_terminated(run.info.run_id, "FINISHED")
        return run

    def open_training(self, round: Round) -> Run:
        """Return a running run for a training: that of the same training which died, or a new one."""
        training, now = training_identity(round), str(_now())
        died = self._ended_training(round, training)
        if died and _is_active(died):
            self.client.update_run(died.info.run_id, status="RUNNING")
            self.client.set_tag(died.info.run_id, HEARTBEAT, now)
            return died
        return self._create(f"round {round.key}", None, self._tags(round, {TRAINING: training, HEARTBEAT: now}))

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

    def find(self, round: Round, identity: str) -> Run | None:
        """Return the run of these weights, or of a training that made them while MLflow was out of reach."""
        if same := [run for run in self.runs if run.data.tags.get(IDENTITY) == identity]:
            return self._pick(sorted(same, key=lambda run: run.data.tags.get(CURRENT) != "true"))
        ended = None if round.key == BASE else self._ended_training(round, training_identity(round))
        return self._pick([ended]) if ended else None

    def create(self, round: Round, identity: str) -> Run:
        """Create the run of a round's weights, or of base's."""
        name = round.key if round.key == BASE else f"round {round.key}"
        return self._create(name, identity, self._tags(round, {}))

    def make_current(self, run: Run) -> None:
        """Tag a run as its round's current one."""
        for other in self.runs_of(run.data.tags[ROUND]):
            wanted, tag = str(other.info.run_id == run.info.run_id).lower(), other.data.tags.get(CURRENT)
            if tag != wanted and (tag or wanted == "true"):
                self.client.set_tag(other.info.run_id, CURRENT, wanted)

    def _ended_training(self, round: Round, training: str) -> Run | None:
        """Return the newest run of a training with these inputs that did not finish and is not going on elsewhere."""
        for run in reversed(self.runs):
            tags = run.data.tags
            if (tags.get(ROUND), tags.get(TRAINING)) != (round.key, training) or IDENTITY in tags:
                continue
            # in this clone the round's lock sees to it that no other training of the round is going on
            if not is_alive(run) or tags.get(CLONE) == _clone(round.root):
                return run
        return None

    def _tags(self, round: Round, more: dict[str, str]) -> dict[str, str]:
        tags = {KIND: "round", ROUND: round.key, "mlflow.parentRunId": self.parent.info.run_id}
        tags[CLONE] = _clone(round.root)
        if experiment := os.environ.get("DVC_EXP_NAME"):
            tags["srpo.dvc_experiment"] = experiment
        return tags | more

    def _create(self, name: str, identity: str | None, tags: dict[str, str]) -> Run:
        """Create a run; of two that clones create at the same time the older is kept, and the other, empty, deleted."""
        tags |= {PROJECT: self.project, CAMPAIGN: self.name} | ({IDENTITY: identity} if identity else {})
        run = self.client.create_run(self.experiment, run_name=name, tags=tags)
        if identity:
            found = self._search(IDENTITY, identity)
            first = next((twin for twin in found if _is_active(twin) and twin.data.tags[PROJECT] == self.project), run)
            if first.info.run_id != run.info.run_id:
                self.client.delete_run(run.info.run_id)
                run = first
        self.runs.append(run)
        return run

    def _pick(self, runs: list[Run]) -> Run:
        """Return the first run that is not deleted; if all are, restore the first."""
        run = next(filter(_is_active, runs), runs[0])
        if not _is_active(run):
            self.client.restore_run(run.info.run_id)
            log.warning("MLflow: %s (%s) was deleted in MLflow; restored it", run.info.run_name, run.info.run_id)
        return run

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
    if run.info.status != "RUNNING":
        return False
    times = [point.timestamp for point in run.data.to_proto().metrics]
    beat = max(run.info.start_time, int(run.data.tags.get(HEARTBEAT, 0)), *times)
    return _now() - beat < HEARTBEAT_SECONDS * 1000


def _is_active(run: Run) -> bool:
    return run.info.lifecycle_stage == "active"


def _clone(root: Path) -> str:
    return value_digest([platform.node(), str(project_folder(root))])[:12]


def _now() -> int:
    return int(time.time() * 1000)
