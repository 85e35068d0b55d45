"""Synchronization of rounds to MLflow, which only ever adds.

What another clone logged stays; only `srpo track --rebuild` deletes. MLflow never stops a round: any error is one
warning, and `srpo track` adds later what is missing.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.config.tree import order
from srpo.rounds import BASE, Round, RoundFiles
from srpo.runtime.extras import require
from srpo.storage.hashing import file_digest, value_digest
from srpo.tracking.connection import reason
from srpo.tracking.records import Point, RoundRecord, curve_points, round_record
from srpo.tracking.runs import CURRENT, IDENTITY, Campaign, opened
from srpo.tracking.view import save_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

log = logging.getLogger(__name__)

LOGGED = "srpo.logged"  # digests of the curves and artifacts that the run has
MAX_MARKS = 500  # fit a tag, which holds 8,000 characters


def sync_round(round: Round) -> bool:
    """Add to MLflow what is missing of one round, or of base; return False and warn if that failed."""
    return _sync([round], stage=True)


def sync_campaign(params: Params, root: Path, rebuild: bool = False) -> bool:
    """Add to MLflow what is missing of base and of all rounds; return False and warn if that failed.

    Args:
        rebuild: first delete all runs of this project's campaign, except those of living trainings.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "`srpo track`")
    keys = [key for key in (BASE, *order(params.rounds)) if RoundFiles(root, key).folder.is_dir()]
    return _sync([Round.of(params, root, key) for key in keys], rebuild=rebuild)


def _sync(rounds: list[Round], stage: bool = False, rebuild: bool = False) -> bool:
    done: list[bool] = []

    def work() -> None:
        with opened(rounds[0].params, rounds[0].root) as campaign:
            if rebuild:
                campaign.delete()
            campaign.end_dead_runs()
            done.extend(attempt(f"round {round.key}", partial(add_round, campaign, round, stage)) for round in rounds)
            if not stage:
                log.info("MLflow: the rounds are at %s", save_view(campaign, rounds[0].params))

    return not rounds or (attempt("campaign", work) and all(done))


def add_round(campaign: Campaign, round: Round, stage: bool = False, run: Run | None = None) -> None:
    """Add to a round's run, and to the campaign's curves, what they lack.

    Args:
        stage: a stage of this round has just run here, so its run becomes the current one.
        run: the run of the training that has just ended; else it is found by the weights, or created.
    """
    record = round_record(round)
    if record is None:
        return
    identity = value_digest([campaign.name, round.key, record.weights])[:16]
    record.tags[IDENTITY] = identity
    run = run or campaign.find(round, identity)
    is_new = stage or run is None
    run = run or campaign.create(round, identity)
    _complete(campaign.client, run, record)
    if campaign.is_copy:
        return
    current = [other for other in campaign.runs_of(round.key) if other.data.tags.get(CURRENT) == "true"]
    if is_new or len(current) != 1:  # two clones may have tagged theirs at the same time
        campaign.make_current(current[0] if current and not is_new else run)
    _add_curve(campaign, round)


def attempt(what: str, work: Callable[[], object]) -> bool:
    """Run what needs MLflow; return False and warn in one line if it fails, whatever the error is."""
    try:
        work()
    except Exception as error:
        log.warning("MLflow: %s not recorded (%s); run `srpo track` later", what, reason(error))
        return False
    return True


def _add_curve(campaign: Campaign, round: Round) -> None:
    from mlflow.entities import RunTag

    parent, points = campaign.parent, curve_points(round)
    name, mark = f"{LOGGED}.{round.key}", value_digest(points)[:12]
    if points and parent.data.tags.get(name) != mark:
        metrics = _missing(campaign.client, parent, points)
        campaign.client.log_batch(parent.info.run_id, metrics=metrics, tags=[RunTag(name, mark)])


def _complete(client: MlflowClient, run: Run, record: RoundRecord) -> None:
    """Give a run what it lacks. Tags are last, so that an interrupted synchronization is repeated."""
    from mlflow.entities import Param, RunTag

    run_id, tags = run.info.run_id, run.data.tags
    logged = tags.get(LOGGED, "").split()
    marks = {name: value_digest([name, file_digest(path)])[:12] for name, path in record.artifacts.items()}
    for name, path in record.artifacts.items():
        if marks[name] not in logged:
            client.log_artifact(run_id, str(path), str(Path(name).parent) if "/" in name else None)
    known = run.inputs.dataset_inputs if run.inputs else []
    inputs = {(item.dataset.name, item.dataset.digest) for item in known}
    if datasets := [_dataset(*item) for item in record.datasets.items() if item not in inputs]:
        client.log_inputs(run_id, datasets=datasets)
    metrics = []
    for name, points in (("training", record.training), ("evaluation", record.evaluation)):
        marks[name] = value_digest([name, points])[:12]
        if points and marks[name] not in logged:
            metrics += _missing(client, run, points, values=name == "evaluation")
    new = [mark for mark in marks.values() if mark not in logged]
    wanted = {name: value for name, value in record.tags.items() if new or name not in tags}
    wanted[LOGGED] = " ".join([*logged, *new][-MAX_MARKS:])
    client.log_batch(
        run_id,
        metrics=metrics,
        params=[Param(name, value) for name, value in record.params.items() if name not in run.data.params],
        tags=[RunTag(name, value) for name, value in wanted.items() if tags.get(name) != value],
    )
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")


def _missing(client: MlflowClient, run: Run, points: list[Point], values: bool = True) -> list[Metric]:
    """Return the points that the run lacks.

    Clones that add the same point at the same time give it the same time, so that MLflow keeps it once.

    Args:
        values: another value at the same step is a new point; else there is one point a step.
    """
    from mlflow.entities import Metric

    known: dict[tuple[str, int], set[str]] = {}
    last = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    for name in {name for name, _, step in points if step <= last.get(name, -1)}:
        for point in client.get_metric_history(run.info.run_id, name):
            known.setdefault((name, point.step), set()).add(_shown(point.value))
    missing = []
    for name, value, step in points:
        there = known.get((name, step), set())
        if not there or (values and _shown(value) not in there):
            missing.append(Metric(name, value, run.info.start_time + step + len(there), step))
    return missing


def _dataset(name: str, digest: str) -> DatasetInput:
    """Return a dataset of DVC as an input in MLflow; the hash just fits MLflow's limit of 36 characters."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    context = "candidates" if name == "candidates" else "training"
    dataset = Dataset(name, digest, source_type="dvc", source=json.dumps({"dvc": digest}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _shown(value: float) -> str:
    """Return a value as it compares in all databases, which hold infinity as the largest float."""
    limit = sys.float_info.max
    return "nan" if math.isnan(value) else f"{max(-limit, min(limit, value)):.9g}"
