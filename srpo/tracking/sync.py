"""Synchronization of rounds to MLflow, which only ever adds.

What another clone logged stays; only `srpo track --rebuild` deletes. MLflow never stops a round: any error is one
warning, and `srpo track` adds later what is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.config.tree import order
from srpo.rounds import BASE, Round, RoundFiles
from srpo.runtime.extras import require
from srpo.storage.hashing import file_digest, value_digest
from srpo.tracking.campaign import CURRENT, IDENTITY, Campaign, opened
from srpo.tracking.connection import reason
from srpo.tracking.records import Point, Record, curve_points, round_record, training_identity
from srpo.tracking.view import save_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

log = logging.getLogger(__name__)

LOGGED = "srpo.logged"  # tags with digests of what the run has had: curves, and all artifacts
MAX_LOGGED = 600  # fit a tag, which holds 8,000 characters


def sync_round(round: Round, run_id: str | None = None) -> bool:
    """Add to MLflow what is missing of one round, or of base, a stage of which has just run here.

    Args:
        run_id: the run of the training that has just ended.

    Returns:
        Whether that succeeded; if not, there is a warning.
    """

    def work() -> None:
        with opened(round.params, round.root) as campaign:
            campaign.end_dead_runs()
            _add_round(campaign, round, campaign.client.get_run(run_id) if run_id else None, just_ran=True)

    return attempt(f"round {round.key}", work)


def sync_campaign(params: Params, root: Path, rebuild: bool = False) -> bool:
    """Add to MLflow what is missing of base and of all rounds; return False and warn if that failed.

    Args:
        rebuild: first delete all runs of this project's campaign, except those of living trainings.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "`srpo track`")
    keys = [key for key in (BASE, *order(params.rounds)) if RoundFiles(root, key).folder.is_dir()]
    rounds, done = [Round.of(params, root, key) for key in keys], list[bool]()

    def work() -> None:
        with opened(params, root) as campaign:
            if rebuild:
                campaign.delete()
            campaign.end_dead_runs()
            done.extend(attempt(f"round {round.key}", partial(_add_round, campaign, round)) for round in rounds)
            log.info("MLflow: the rounds are at %s", save_view(campaign, params))

    return not rounds or (attempt("campaign", work) and all(done))


def attempt(what: str, work: Callable[[], object]) -> bool:
    """Run what needs MLflow; return False and warn in one line if it fails, whatever the error is."""
    try:
        work()
    except Exception as error:
        log.warning("MLflow: %s not recorded (%s); run `srpo track` later", what, reason(error))
        return False
    return True


def _add_round(campaign: Campaign, round: Round, run: Run | None = None, just_ran: bool = False) -> None:
    """Add to a round's run, found by its weights if not given, and to the campaign's curves, what they lack."""
    record = round_record(round)
    if record is None:
        return
    identity = value_digest([campaign.name, round.key, record.weights])[:16]
    # a training may have ended while MLflow was out of reach
    run = run or campaign.find(identity) or campaign.find(training_identity(round))
    is_new = just_ran or run is None
    run = run or campaign.create(round, identity)
    record.tags[IDENTITY] = identity
    _add(campaign.client, run, record)
    if campaign.is_copy:
        return
    current = next((other for other in campaign.runs_of(round.key) if other.data.tags.get(CURRENT) == "true"), run)
    campaign.make_current(run if is_new else current)
    _add(campaign.client, campaign.parent, Record(curves={round.key: curve_points(round)}))


def _add(client: MlflowClient, run: Run, record: Record) -> None:
    """Give a run what it lacks of a record."""
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    metrics: list[Metric] = []
    new = {f"{LOGGED}.artifacts": _add_artifacts(client, run, record.artifacts)}
    for name, curve in record.curves.items():
        tag, digest = f"{LOGGED}.{name}", value_digest(curve)[:12]
        if curve and digest not in _words(run, tag):
            new[tag] = [digest]
            metrics += _new_points(client, run, curve, len(_words(run, tag)))
    known = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
    if datasets := [_dataset(*item) for item in record.datasets.items() if item[0] not in known]:
        client.log_inputs(run_id, datasets=datasets)
    if any(new.values()):
        params = [Param(name, value) for name, value in record.params.items() if name not in run.data.params]
        client.log_batch(run_id, metrics, params)
        # tags are last, so that an interrupted synchronization is repeated
        logged = {tag: " ".join([*_words(run, tag), *digests][-MAX_LOGGED:]) for tag, digests in new.items() if digests}
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in (record.tags | logged).items()])
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")


def _words(run: Run, tag: str) -> list[str]:
    return run.data.tags.get(tag, "").split()


def _add_artifacts(client: MlflowClient, run: Run, artifacts: dict[str, Path]) -> list[str]:
    """Upload the files that the run has never had; return their digests."""
    known, new = _words(run, f"{LOGGED}.artifacts"), []
    for name, path in artifacts.items():
        digest = value_digest([name, file_digest(path)])[:12]
        if digest not in known:
            client.log_artifact(run.info.run_id, str(path), str(Path(name).parent) if "/" in name else None)
            new.append(digest)
    return new


def _new_points(client: MlflowClient, run: Run, points: list[Point], earlier: int) -> list[Metric]:
    """Return the points that the run lacks if it has had this many other curves in the place of this one.

    The time of a point follows from its step and that number. So it is the same whoever adds the point and whenever,
    and MLflow keeps points that are equal, time included, once.
    """
    from mlflow.entities import Metric

    names, time = {name for name, _, _ in points} if earlier else (), run.info.start_time + earlier
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    known = {(name, point.value, point.step) for name, history in histories.items() for point in history}
    new = [point for point in points if point not in known]
    return [Metric(name, value, time + step, step) for name, value, step in new]


def _dataset(name: str, digest: str) -> DatasetInput:
    """Return a dataset of DVC as an input in MLflow; the hash just fits MLflow's limit of 36 characters."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    context = "candidates" if name == "candidates" else "training"
    dataset = Dataset(name, digest, source_type="dvc", source=json.dumps({"dvc": digest}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
