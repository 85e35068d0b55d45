"""Everyday accidents with MLflow: each ends in the right state, or in one line with a remedy."""

from __future__ import annotations

import contextlib
import http.server
import logging
import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import ViewType

from srpo.rounds import Round
from srpo.storage.project import project_folder, project_identity
from srpo.tracking.live import live
from srpo.tracking.sync import sync_campaign, sync_round
from tests.tracking.test_sync import campaign, client_of, params_of, project, runs_of, story

__all__ = ["campaign", "project"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return lines


def test_deleted_experiment_is_restored(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    params, client = params_of(project), client_of(project)
    sync_campaign(params, project)
    before = story(project)
    client.delete_experiment(client.get_experiment_by_name("srpo").experiment_id)
    assert sync_campaign(params, project)
    assert warnings_of(caplog) == ["MLflow: the experiment srpo was deleted in MLflow; restored it and its runs"]
    assert story(project) == before


def test_deleted_runs_are_restored(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    params, client = params_of(project), client_of(project)
    sync_campaign(params, project)
    before = story(project)
    for run in runs_of(client):
        if run.info.run_name in ("tiny", "round 001"):
            client.delete_run(run.info.run_id)
    assert sync_campaign(params, project)
    lines = warnings_of(caplog)
    assert len(lines) == 2 and all("was deleted in MLflow; restored it" in line for line in lines)
    assert story(project) == before and not runs_of(client, ViewType.DELETED_ONLY)


def test_longest_param_is_recorded_once(project: Path) -> None:
    params, client = params_of(project), client_of(project)
    modules = [f"down_blocks.{i}.attentions.0.to_q" for i in range(400)]
    params = params.model_copy(update={"train": params.train.model_copy(update={"target_modules": modules})})
    for _ in range(2):
        assert sync_round(Round.of(params, project, "001"))
    (run,) = [run for run in runs_of(client) if run.data.tags.get("srpo.round") == "001"]
    assert len(run.data.params["train.target_modules"]) == 6000


def test_moved_project_keeps_its_artifacts(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sync_campaign(params_of(project), project)
    before, moved = story(project), tmp_path / "elsewhere" / "project"
    moved.parent.mkdir()
    shutil.move(project, moved)
    assert sync_campaign(params_of(moved), moved)
    assert any("the project folder has moved" in line for line in warnings_of(caplog))
    assert story(moved) == before and not project.exists()
    assert all(str(moved) in run.info.artifact_uri for run in runs_of(client_of(moved)))
    assert sync_campaign(params_of(moved), moved) and not warnings_of(caplog)


def test_newer_schema_is_one_line(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    assert not sync_campaign(params_of(project), project)
    (line,) = warnings_of(caplog)
    assert "last used with another version of MLflow" in line and "mlflow db upgrade" in line and "\n" not in line


@pytest.fixture
def refusing() -> Iterator[str]:
    """Return the address of a server that answers every request with status 401."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_expired_credentials_are_one_line(project: Path, refusing: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not sync_campaign(params_of(project, refusing), project)
    (line,) = warnings_of(caplog)
    assert "credentials refused or expired; renew MLFLOW_TRACKING_USERNAME" in line


def test_copy_of_a_dvc_experiment_logs_to_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_campaign(params_of(project), project)
    before, copy = story(project), project / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns(".dvc", "mlflow.db", "mlartifacts", ".srpo*"))
    assert project_folder(copy) == project and project_identity(copy) == "project-1"
    from tests.support.campaign import write_training

    params = params_of(copy)
    write_training(params, copy, "002", steps=40)
    monkeypatch.setenv("DVC_EXP_NAME", "more-steps")
    assert sync_campaign(params, copy)
    assert not (copy / "mlflow.db").exists() and story(project) == before
    runs = [run for run in runs_of(client_of(project)) if run.data.tags.get("srpo.dvc_experiment") == "more-steps"]
    assert [run.info.run_name for run in runs] == ["round 002"]


def test_without_mlflow_a_training_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mlflow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with live(Round.of(params_of(project), project, "001")) as log_step:
        log_step({"loss": 1.0}, 1)
    (line,) = warnings_of(caplog)
    assert line.startswith("MLflow: live curve not recorded (")
