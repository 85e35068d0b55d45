"""Live curve of a training in MLflow, with the machine's load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.progress import OnStep
from srpo.tracking.campaign import opened
from srpo.tracking.sync import attempt, sync_round


@contextlib.contextmanager
def live(round: Round) -> Iterator[OnStep]:
    """Open the curve of a training that starts now; when the block ends, close it and record the training.

    Of several processes only the first logs. Errors of MLflow are one warning.
    """
    is_first = distributed.rank() == 0 and not distributed.is_parent(round.params.runtime)
    if not is_first or not attempt("live curve", partial(_start, round)):
        yield lambda metrics, step: None
        return
    import mlflow
    from mlflow.entities import Metric

    client, run = mlflow.MlflowClient(), mlflow.active_run()
    assert run
    run_id, start = run.info.run_id, run.info.start_time

    def log(metrics: Mapping[str, float], step: int) -> None:
        # a resumed training logs its first steps again: MLflow keeps points that are equal, time included, once
        points = [Metric(f"train/{name}", value, start + step, step) for name, value in metrics.items()]
        attempt("live curve", partial(client.log_batch, run_id, points, synchronous=False))

    status = "FINISHED"
    try:
        yield log
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        # waits until all has been sent
        if attempt("end of the live curve", partial(mlflow.end_run, status)) and status == "FINISHED":
            sync_round(round, run_id)


def _start(round: Round) -> None:
    import mlflow

    with opened(round.params, round.root) as campaign:
        mlflow.start_run(campaign.open_training(round).info.run_id, log_system_metrics=True)
