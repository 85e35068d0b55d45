"""Everything MLflow. What stands there is a projection of `rounds/` and `dvc.lock` and can be rebuilt from them.

One run spans the campaign: its curves have the round's depth in the tree as step (base is 0). Of rounds of the
same depth the first in params.yaml has the plain metric names, the others `<metric>/<round>`. Each round, base
included, has a child run with its training curve, measures, contact sheets, hashes and params.

MLflow never stops a round: what fails here is one warning, and `srpo track` fills the gap later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from srpo import projection
from srpo.params import Params
from srpo.rounds import BASE, RoundFiles, order

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("srpo")
FLUSH_SECONDS = 2.0
BATCH = 1000  # MLflow's limit of metrics in one request


class Curve:
    """Where a stage logs while it runs."""

    def __init__(self, send: Callable[[list[tuple[str, float, int]]], None] | None) -> None:
        self._send, self._points, self._flushed = send, [], time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point per metric; sent in batches every two seconds, so that it does not slow the loop."""
        self._points += [(name, value, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered. The first failure ends the sending, with one warning."""
        points, self._points, self._flushed = self._points, [], time.monotonic()
        if points and self._send and not _attempt("live curve", lambda: self._send(points)):
            self._send = None


@contextlib.contextmanager
def live(params: Params, root: Path, key: str) -> Iterator[Curve]:
    """A curve in a fresh child run of this round; an earlier one of the same round goes to MLflow's bin."""
    send = None

    def open_run() -> None:
        nonlocal send
        client, experiment = _connect(params, root)
        with _lock(root):
            campaign = _campaign(client, experiment, params)
            for run in _children(client, experiment, params, key):
                client.delete_run(run.info.run_id)
            run_id = _create_child(client, experiment, params, key, campaign)
        send = lambda points: _log_points(client, run_id, points)  # noqa: E731

    _attempt("live curve", open_run)
    curve = Curve(send)
    try:
        yield curve
    finally:
        curve.flush()


def project(params: Params, root: Path, key: str) -> bool:
    """Bring MLflow's records of one round (or of base) up to date; False when it can't be reached."""

    def work() -> None:
        client, experiment = _connect(params, root)
        with _lock(root):
            campaign = _project_campaign(client, experiment, params, root)
            _project_round(client, experiment, params, root, key, campaign)

    return _attempt(f"round {key}", work)


def sync(params: Params, root: Path) -> bool:
    """Project base and every round that has files; False when MLflow can't be reached."""
    keys = [key for key in (BASE, *order(params.rounds)) if (RoundFiles(root, key).adapter / "lineage.json").exists()]
    return all(project(params, root, key) for key in keys)


def _project_campaign(client: MlflowClient, experiment: str, params: Params, root: Path) -> str:
    wanted = projection.campaign_points(params, root)
    run_id = _campaign(client, experiment, params)
    known = {
        (name, point.step): point.value
        for name in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, name)
    }
    if any((name, step) in known and not _same(known[name, step], value) for name, value, step in wanted):
        client.delete_run(run_id)  # a round was run again: curves can't be edited, so they are drawn anew
        old, run_id, known = run_id, _campaign(client, experiment, params), {}
        for run in _search(client, experiment, f"tags.`mlflow.parentRunId` = '{old}'"):
            client.set_tag(run.info.run_id, "mlflow.parentRunId", run_id)
    _log_points(client, run_id, [point for point in wanted if (point[0], point[2]) not in known])
    return run_id


def _project_round(client: MlflowClient, experiment: str, params: Params, root: Path, key: str, campaign: str) -> None:
    wanted = projection.round_record(params, root, key)
    last = {name: value for name, value, _ in wanted.points}
    found = _children(client, experiment, params, key)
    run = found[0] if found else None
    if run and any(not _same(last.get(name), value) for name, value in run.data.metrics.items()):
        client.delete_run(run.info.run_id)
        run = None
    run_id = run.info.run_id if run else _create_child(client, experiment, params, key, campaign)
    logged, tags = (run.data.metrics, run.data.tags) if run else ({}, {})
    _log_points(client, run_id, [point for point in wanted.points if point[0] not in logged])
    for name, value in wanted.tags.items():
        if tags.get(name) != value:
            client.set_tag(run_id, name, value)
    if not run or not run.data.params:
        client.log_batch(run_id, params=projection.param_entities(wanted.params))
    if tags.get(projection.ARTIFACTS_TAG) != wanted.artifacts_digest:
        for path, folder in wanted.artifacts:
            client.log_artifact(run_id, str(path), folder)
        client.set_tag(run_id, projection.ARTIFACTS_TAG, wanted.artifacts_digest)
    if wanted.datasets and not (run and run.inputs.dataset_inputs):
        client.log_inputs(run_id, datasets=projection.dataset_inputs(wanted.datasets))
    client.set_terminated(run_id, "FINISHED")


def _connect(params: Params, root: Path) -> tuple[MlflowClient, str]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri, artifacts = params.tracking.uri, None
    if match := re.fullmatch(r"sqlite:///(?!/)(.*)", uri):
        uri, artifacts = f"sqlite:///{root.resolve() / match[1]}", (root / "mlartifacts").resolve().as_uri()
    with _lock(root):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(params.tracking.experiment)
        if experiment is None:
            return client, client.create_experiment(params.tracking.experiment, artifact_location=artifacts)
    return client, experiment.experiment_id


def _campaign(client: MlflowClient, experiment: str, params: Params) -> str:
    name = params.tracking.campaign
    found = _search(client, experiment, f"tags.`srpo.campaign` = '{name}' AND tags.`srpo.kind` = 'campaign'")
    if found:
        return found[0].info.run_id
    tags = {"srpo.campaign": name, "srpo.kind": "campaign"}
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _children(client: MlflowClient, experiment: str, params: Params, key: str) -> list[Run]:
    name = params.tracking.campaign
    return _search(client, experiment, f"tags.`srpo.campaign` = '{name}' AND tags.`srpo.round` = '{key}'")


def _create_child(client: MlflowClient, experiment: str, params: Params, key: str, campaign: str) -> str:
    tags = {
        "srpo.campaign": params.tracking.campaign,
        "srpo.kind": "round",
        "srpo.round": key,
        "mlflow.parentRunId": campaign,
    }
    name = key if key == BASE else f"round {key}"
    return client.create_run(experiment, run_name=name, tags=tags).info.run_id


def _search(client: MlflowClient, experiment: str, condition: str) -> list[Run]:
    return list(client.search_runs([experiment], condition))


def _log_points(client: MlflowClient, run_id: str, points: list[tuple[str, float, int]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entities = [Metric(name, value, now, step) for name, value, step in points]
    for start in range(0, len(entities), BATCH):
        client.log_batch(run_id, metrics=entities[start : start + BATCH])


def _same(one: float | None, other: float) -> bool:
    return one is not None and abs(one - other) <= 1e-9 * max(1.0, abs(one), abs(other))


def _lock(root: Path):
    from filelock import FileLock

    (root / ".srpo").mkdir(exist_ok=True)
    return FileLock(root / ".srpo" / "mlflow.lock", timeout=120)


def _attempt(what: str, work: Callable[[], None]) -> bool:
    try:
        work()
    except Exception as error:  # whatever a tracking server can do wrong, the round goes on
        reason = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))
        log.warning("MLflow: %s not recorded (%s: %.160s); run `srpo track` later", what, type(error).__name__, reason)
        return False
    return True
