"""Everything MLflow. What stands there is a projection of `rounds/` and `dvc.lock` and can be rebuilt from them.

One run spans the campaign: its curves have the round's depth in the tree as step (base is 0). Of rounds of the
same depth the first in params.yaml has the plain metric names, the others `<metric>/<round>`. Each round, base
included, has a child run with its training curve, measures, contact sheets, hashes and params. A child run is
RUNNING until the round has an adapter.

A run may only grow toward what the files say. Where it says anything else, it goes to MLflow's bin (`mlflow gc`
empties that) and is made anew. A training that died leaves its curve in place until the next one.

MLflow never stops a round: what fails here is one warning, and `srpo track` fills the gap later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from srpo.config.loader import Params
from srpo.config.tree import ancestors, order
from srpo.errors import UserError, one_line, without_secrets
from srpo.rounds import BASE, Round, RoundFiles
from srpo.runtime import distributed
from srpo.runtime.extras import require
from srpo.storage.hashing import file_digest, value_digest
from srpo.tracking import records as projection
from srpo.tracking.records import Point

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger("srpo")
FLUSH_SECONDS = 2.0
LOCK_SECONDS = 120
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
BATCH = 1000  # MLflow's limit of metrics in one request
SYSTEM = "system/"  # load and memory while the round trained: from no file, so they are left alone
PICTURES_TAG, NOTE_TAG = "srpo.pictures", "mlflow.note.content"
CAMPAIGN_NOTE = (
    "Every round of the campaign on held-out prompts. Step is the round's place in the tree: 0 is base, 1 its children."
    " A name such as `judge/002b` is the curve of round 002b, a branch. Judges, FID, KID and diversity decide; a rise"
    " of the selecting reward alone proves little. Each round's pictures and report are in its own run below this one."
)
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Curve:
    """Where a stage logs while it runs."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._run_id = ""
        self._points: list[Point] = []
        self._flushed = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point per metric; sent in batches every two seconds, so that it does not slow the loop."""
        self._points += [(name, value, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered. The first failure ends the sending, with one warning."""
        client, points = self._client, self._points
        if client and points and not _attempt("live curve", lambda: _log_points(client, self._run_id, points)):
            self._client = None
        self._points, self._flushed = [], time.monotonic()

    def _open(self, client: MlflowClient, uri: str, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client, self._run_id = client, run_id
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self._monitor.start()

    def _close(self, status: str) -> None:
        if self._monitor:
            self._monitor.finish()
        self.flush()
        if client := self._client:
            _attempt("end of the live curve", lambda: client.set_terminated(self._run_id, status))


@contextlib.contextmanager
def live(round: Round) -> Iterator[Curve]:
    """A curve in a fresh child run of this round; an earlier one of the same round goes to MLflow's bin.

    Among several processes only the first has one; what the others log goes nowhere.
    """
    curve, status = Curve(), "FINISHED"
    if distributed.rank() or distributed.is_parent(round.params.runtime):
        yield curve
        return
    with contextlib.ExitStack() as stack:

        def open_run() -> None:
            # while this is held, MLflow knows more than the round's files, and `project` leaves the round alone
            stack.enter_context(_lock(round.root, f"live@{round.key}", timeout=0))
            with opened(round.params, round.root) as records:
                campaign = records.campaign()
                for run in records.children(round.key):
                    records.client.delete_run(run.info.run_id)
                curve._open(records.client, records.uri, records.create_child(round.key, campaign))

        _attempt("live curve", open_run)
        try:
            yield curve
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            raise
        finally:
            curve._close(status)


def project(round: Round) -> bool:
    """Bring MLflow's records of one round (or of base) up to date; False when that failed, with a warning."""
    return _project(round.params, round.root, [round.key])


def sync(params: Params, root: Path) -> bool:
    """Project base and every round of params.yaml that has files; False when something failed, with a warning.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "`srpo track`")
    keys = [key for key in (BASE, *order(params.rounds)) if RoundFiles(root, key).folder.is_dir()]
    return _project(params, root, keys)


def _project(params: Params, root: Path, keys: list[str]) -> bool:
    done = []

    def work() -> None:
        with opened(params, root) as records:
            campaign = records.project_campaign()
            done.extend(_attempt(f"round {key}", lambda key=key: records.project_round(key, campaign)) for key in keys)

    return _attempt("campaign", work) and all(done)


@dataclass(frozen=True)
class Records:
    """The runs of one campaign in one experiment, at the address `uri`."""

    client: MlflowClient
    uri: str
    experiment: str
    params: Params
    root: Path

    def campaign(self) -> str:
        """The id of the campaign's run, made if there is none."""
        tags = {"srpo.campaign": self.params.tracking.campaign, "srpo.kind": "campaign", NOTE_TAG: CAMPAIGN_NOTE}
        if found := self._search("srpo.kind", "campaign"):
            return found[0].info.run_id
        run = self.client.create_run(self.experiment, run_name=self.params.tracking.campaign, tags=tags)
        self.client.set_terminated(run.info.run_id, "FINISHED")
        return run.info.run_id

    def children(self, key: str) -> list[Run]:
        return self._search("srpo.round", key)

    def create_child(self, key: str, campaign: str) -> str:
        tags = {"srpo.kind": "round", "srpo.round": key, "mlflow.parentRunId": campaign}
        tags["srpo.campaign"] = self.params.tracking.campaign
        name = key if key == BASE else f"round {key}"
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def project_campaign(self) -> str:
        wanted = projection.campaign_points(self.params, self.root)
        run_id = self.campaign()
        known = self._history(self.client.get_run(run_id))
        if not _agree(known, wanted):  # a round was run again: curves can't be edited, so they are drawn anew
            self.client.delete_run(run_id)
            children, run_id, known = self._search("mlflow.parentRunId", run_id), self.campaign(), []
            for run in children:
                self.client.set_tag(run.info.run_id, "mlflow.parentRunId", run_id)
        _log_points(self.client, run_id, wanted, known)
        return run_id

    def project_round(self, key: str, campaign: str) -> None:
        files, wanted = RoundFiles(self.root, key), projection.round_record(Round.of(self.params, self.root, key))
        if _is_locked(self.root, f"live@{key}"):
            return
        sheets = [path for path, _ in wanted.artifacts if path.suffix == ".png"]
        wanted.tags |= {PICTURES_TAG: value_digest([file_digest(path) for path in sheets])} if sheets else {}
        wanted.tags[NOTE_TAG] = _note(self.params, key, wanted)
        run, known = None, []
        for found in self.children(key):
            if found.info.status != "FINISHED" and "loss" in found.data.metrics and not files.training.exists():
                # its training died; what it told is nowhere else
                if found.info.status == "RUNNING":
                    self.client.set_terminated(found.info.run_id, "KILLED")
                return
            history = self._history(found)
            if run is None and _agree(history, wanted.points) and _may_grow(found, wanted):
                run, known = found, history
            else:
                self.client.delete_run(found.info.run_id)
        run = run or self.client.get_run(self.create_child(key, campaign))
        self._complete(run, known, wanted, sheets)
        trained = (files.adapter / "lineage.json").exists()
        if run.info.status != "FINISHED" and trained:
            self.client.set_terminated(run.info.run_id, "FINISHED")

    def _complete(self, run: Run, known: list[Point], wanted: projection.RoundRecord, sheets: list[Path]) -> None:
        """Give the run what it lacks. Tags that vouch for files go last, so that a crash is mended by a repeat."""
        from mlflow.entities import RunTag
        from PIL import Image

        run_id, tags = run.info.run_id, run.data.tags
        _log_points(self.client, run_id, wanted.points, known)
        self.client.log_batch(run_id, params=projection.param_entities(wanted.params))
        if missing := set(wanted.datasets) - {item.dataset.name for item in run.inputs.dataset_inputs}:
            inputs = {name: wanted.datasets[name] for name in sorted(missing)}
            self.client.log_inputs(run_id, datasets=projection.dataset_inputs(inputs))
        wanted.tags[projection.ARTIFACTS_TAG] = wanted.artifacts_digest
        if tags.get(projection.ARTIFACTS_TAG) != wanted.artifacts_digest:
            for path, folder in wanted.artifacts:
                self.client.log_artifact(run_id, str(path), folder)
        if tags.get(PICTURES_TAG) != wanted.tags.get(PICTURES_TAG):
            for path in sheets:  # the same key in every round, so that the UI's image grid lays rounds side by side
                with Image.open(path) as sheet:
                    self.client.log_image(run_id, sheet, key=path.stem, step=self._depth(run))
        changed = [RunTag(name, value) for name, value in wanted.tags.items() if tags.get(name) != value]
        self.client.log_batch(run_id, tags=changed)

    def _depth(self, run: Run) -> int:
        key = run.data.tags["srpo.round"]
        return 0 if key == BASE else len(ancestors(self.params.rounds, key)) + 1

    def _search(self, tag: str, value: str) -> list[Run]:
        # the campaign's name may hold quotes, so it is compared here and not in the filter
        found = self.client.search_runs([self.experiment], f"tags.`{tag}` = '{value}'", max_results=10_000)
        return [run for run in found if run.data.tags.get("srpo.campaign") == self.params.tracking.campaign]

    def _history(self, run: Run) -> list[Point]:
        return [
            (name, point.value, point.step)
            for name in run.data.metrics
            if not name.startswith(SYSTEM)
            for point in self.client.get_metric_history(run.info.run_id, name)
        ]


@contextlib.contextmanager
def opened(params: Params, root: Path) -> Iterator[Records]:
    """The campaign's records, held by this process alone.

    Raises:
        UserError: MLflow is not installed.
    """
    require("mlflow", "tracking")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    uri, artifacts = params.tracking.uri, None
    if match := re.fullmatch(r"sqlite:///(?!/)(.*)", uri):
        uri = f"sqlite:///{root.resolve() / match[1]}"
    if _database(uri) in ("sqlite", *DATABASE_PORTS):  # no server to decide: else it would be the current folder
        artifacts = (root / "mlartifacts").resolve().as_uri()
    _knock(uri)
    with _lock(root, "mlflow", timeout=LOCK_SECONDS):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(params.tracking.experiment)
        if experiment:
            number = experiment.experiment_id
        else:
            # the tag opens the UI on training runs and not on chat traces
            tags = {"mlflow.experimentKind": "custom_model_development"}
            number = client.create_experiment(params.tracking.experiment, artifacts, tags)
        yield Records(client, uri, number, params, root)


def _knock(uri: str) -> None:
    """Connect to a database's host once: MLflow itself tries for 100 seconds, at every stage.

    Raises:
        OSError: nobody is there.
    """
    place, port = urlsplit(uri), DATABASE_PORTS.get(_database(uri))
    if port and place.hostname:
        socket.create_connection((place.hostname, place.port or port), timeout=10).close()


def _database(uri: str) -> str:
    """What is before the driver's name: postgresql of postgresql+psycopg2://..."""
    return urlsplit(uri).scheme.partition("+")[0]


def _note(params: Params, key: str, wanted: projection.RoundRecord) -> str:
    """The run's description in the UI."""
    if key == BASE:
        return "The untouched base model, measured as every round is."
    verdict = wanted.tags.get("srpo.verdict")
    state = f"The gate says: {verdict}." if verdict else "Not evaluated yet."
    return f"Trained from {params.rounds[key].parent} on its winners. {state} Open report/index.html under Artifacts."


def _agree(known: list[Point], wanted: list[Point]) -> bool:
    """Whether every known point is wanted, as it is and once."""
    values = {(name, step): value for name, value, step in wanted}
    places = [(name, step) for name, _, step in known]
    return len(places) == len(set(places)) and all(
        (name, step) in values and _same(value, values[name, step]) for name, value, step in known
    )


def _may_grow(run: Run, wanted: projection.RoundRecord) -> bool:
    """Whether what MLflow never lets go of (params, inputs, pictures) is what is wanted."""
    inputs = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    return (
        run.data.params.items() <= wanted.params.items()
        and inputs.items() <= wanted.datasets.items()
        and run.data.tags.get(PICTURES_TAG) in (None, wanted.tags.get(PICTURES_TAG))
    )


def _log_points(client: MlflowClient, run_id: str, points: Iterable[Point], known: Iterable[Point] = ()) -> None:
    from mlflow.entities import Metric

    there, now = {(name, step) for name, _, step in known}, int(time.time() * 1000)
    entities = [Metric(name, value, now, step) for name, value, step in points if (name, step) not in there]
    for start in range(0, len(entities), BATCH):
        client.log_batch(run_id, metrics=entities[start : start + BATCH])


def _same(one: float, other: float) -> bool:
    if math.isfinite(other):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return math.isnan(one) if math.isnan(other) else abs(one) > 1e308  # a database holds infinity as its largest float


def _lock(root: Path, name: str, timeout: float) -> BaseFileLock:
    from filelock import FileLock

    (root / ".srpo").mkdir(exist_ok=True)
    return FileLock(root / ".srpo" / f"{name}.lock", timeout=timeout)


def _is_locked(root: Path, name: str) -> bool:
    try:
        with _lock(root, name, timeout=0):
            return False
    except TimeoutError:
        return True


def _attempt(what: str, work: Callable[[], None]) -> bool:
    try:
        work()
    except Exception as error:  # whatever a tracking server can do wrong, the round goes on
        log.warning("MLflow: %s not recorded (%s); run `srpo track` later", what, reason(error))
        return False
    return True


def reason(error: Exception) -> str:
    """What went wrong, in one line that holds no password."""
    if isinstance(error, UserError):
        return str(error)
    words = without_secrets(one_line(error))
    return f"{type(error).__name__}: {words:.160}"
