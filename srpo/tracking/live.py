"""Live curve of a training in MLflow, with the machine's load."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.tracking.connection import as_default
from srpo.tracking.runs import opened
from srpo.tracking.sync import add_round, attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

SYSTEM_SECONDS = 30  # between samples of the machine's load, which are the run's heartbeat, too


@contextlib.contextmanager
def live(round: Round) -> Iterator[Curve]:
    """Open the curve of a training that starts now, and close it when the block ends.

    Of several processes only the first logs. Errors of MLflow are one warning.
    """
    curve, status = Curve(round), "FINISHED"
    if distributed.rank() or distributed.is_parent(round.params.runtime):
        yield curve
        return
    attempt("live curve", curve.open)
    try:
        yield curve
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        attempt("end of the live curve", lambda: curve.close(status))


class Curve:
    """The curve of one training; without `open` it logs nothing."""

    def __init__(self, round: Round) -> None:
        self._round = round
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._uri = self._run_id = ""
        self._known: set[int] = set()

    def open(self) -> None:
        """Start a run in MLflow, or continue the one of this training if it died."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with opened(self._round.params, self._round.root) as campaign:
            run = campaign.open_training(self._round)
            self._uri, self._run_id = campaign.uri, run.info.run_id
            if "train/loss" in run.data.metrics:
                history = campaign.client.get_metric_history(self._run_id, "train/loss")
                self._known = {point.step for point in history}
            self._monitor = SystemMetricsMonitor(
                self._run_id, SYSTEM_SECONDS, resume_logging=True, tracking_uri=self._uri
            )
            self._monitor.start()
            self._client = campaign.client

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of an optimizer step; MLflow sends them in the background.

        A resumed training logs its steps from the first again: those that MLflow has are left out.
        """
        client, now = self._client, int(time.time() * 1000)
        if client and step not in self._known:
            from mlflow.entities import Metric

            points = [Metric(f"train/{name}", value, now, step) for name, value in metrics.items()]
            attempt("live curve", lambda: client.log_batch(self._run_id, metrics=points, synchronous=False))

    def close(self, status: str) -> None:
        """Send what is left and end the run; a finished training gets its record, with what did not arrive."""
        client, self._client = self._client, None
        if client is None:
            return
        import mlflow

        if self._monitor:
            self._monitor.finish()
        with as_default(self._uri):
            mlflow.flush_async_logging()
        if status != "FINISHED":
            client.set_terminated(self._run_id, status)
            return
        with opened(self._round.params, self._round.root) as campaign:
            run = next(run for run in campaign.runs if run.info.run_id == self._run_id)
            add_round(campaign, self._round, stage=True, run=run)
