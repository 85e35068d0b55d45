"""Connection to MLflow: address, experiment, settings, and errors in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from srpo.config.schema import TrackingParams
from srpo.errors import UserError, one_line, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "10",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "30",  # seconds; the samples are a training's heartbeat, too
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
ARTIFACTS_FOLDER = "mlartifacts"
# the columns of MLflow's database that hold absolute paths of artifacts
PATH_COLUMNS = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on chat traces
REMEDIES = {
    r"database schema|Can't locate revision": (
        "the database was last used with another version of MLflow; install that version (pip install -U mlflow),"
        " or migrate with `mlflow db upgrade`"
    ),
    r"\b40[13]\b|unauthorized|forbidden|PERMISSION_DENIED|UNAUTHENTICATED|token.{0,20}expired": (
        "credentials refused or expired; renew MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD,"
        " or MLFLOW_TRACKING_TOKEN"
    ),
}


def connect(tracking: TrackingParams, folder: Path) -> tuple[MlflowClient, str]:
    """Make the project's MLflow this process's default; return a client and the experiment's id.

    An experiment that was deleted in MLflow is restored. Artifact paths in a SQLite database follow a project folder
    that moved.

    Args:
        folder: the project's folder; a relative SQLite address means a file in it.

    Raises:
        Exception: any error of MLflow, the network or the database; `reason` makes one line of it.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for chatty in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    found = re.fullmatch(r"sqlite:///(.*)", tracking.uri)
    database = (folder / found[1]).resolve() if found else None
    _ping_database(tracking.uri)
    mlflow.set_tracking_uri(f"sqlite:///{database}" if database else tracking.uri)
    client = mlflow.MlflowClient()
    # without a server MLflow's default is the current folder
    location = None
    if not tracking.uri.startswith("http"):
        location = ((database.parent if database else folder) / ARTIFACTS_FOLDER).as_uri()
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        return client, client.create_experiment(tracking.experiment, location, TRAINING_VIEW)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        log.warning("MLflow: the experiment %s was deleted in MLflow; restored it and its runs", tracking.experiment)
    if database and location:
        _move_artifact_paths(database, experiment.artifact_location, location)
    return client, experiment.experiment_id


def reason(error: Exception) -> str:
    """Return an error as one line without passwords, with a remedy if one is known."""
    if isinstance(error, UserError):
        return str(error)
    text = without_secrets(one_line(error))
    remedy = next((words for pattern, words in REMEDIES.items() if re.search(pattern, text, re.IGNORECASE)), None)
    return f"{type(error).__name__}: {text:.100}: {remedy}" if remedy else f"{type(error).__name__}: {text:.160}"


def _ping_database(uri: str) -> None:
    """Connect to a database's host once: without a host MLflow retries for 100 seconds.

    Raises:
        OSError: no connection.
    """
    address, port = urlsplit(uri), DATABASE_PORTS.get(urlsplit(uri).scheme.partition("+")[0])
    if port and address.hostname:
        socket.create_connection((address.hostname, address.port or port), timeout=10).close()


def _move_artifact_paths(database: Path, old: str, new: str) -> None:
    """Correct the paths in the database after its folder was moved or copied."""
    if old == new or not (old.startswith("file:") and old.endswith(f"/{ARTIFACTS_FOLDER}")):
        return
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        for table, columns in PATH_COLUMNS.items():
            for column in columns:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} LIKE ?",
                    (new, len(old) + 1, old, f"{old}/%"),
                )
    log.warning("MLflow: the project folder has moved; artifact paths in %s now start with %s", database.name, new)
