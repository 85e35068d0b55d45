"""Synchronization to a real MLflow on SQLite: complete, idempotent, and it only adds."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from srpo.config.loader import Params, load_params
from srpo.rounds import Round
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking import campaign as runs_of_campaign
from srpo.tracking.live import live
from srpo.tracking.records import headline_names
from srpo.tracking.sync import sync_campaign, sync_round
from tests.support.campaign import build_campaign, write_evaluation, write_training

Story = dict[str, dict]
OF_ONE_RUN = ("srpo.clone", "srpo.heartbeat", "srpo.logged", "srpo.git_revision")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and two rounds with reports, and an MLflow database with empty tables, which are slow to make."""
    root = tmp_path_factory.mktemp("campaign") / "project"
    params = build_campaign(root)
    for key in ("001", "002"):
        report(Round.of(params, root, key))
    (root / ".srpo-project").write_text("project-1\n")
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root


@pytest.fixture
def project(campaign: Path, tmp_path: Path) -> Path:
    return shutil.copytree(campaign, tmp_path / "project")


def params_of(root: Path, uri: str | None = None) -> Params:
    params = load_params(root / "params.yaml")
    if uri:
        params = params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": uri})})
    return params


def clone_of(project: Path, name: str, identity: str | None = None) -> tuple[Params, Path]:
    """Return a copy of the project that logs to the same database, as another clone or as another project."""
    root = shutil.copytree(project, project.parent / name)
    if identity:
        (root / ".srpo-project").write_text(identity)
    return params_of(root, f"sqlite:///{project}/mlflow.db"), root


def client_of(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def runs_of(client: MlflowClient, view: int = ViewType.ACTIVE_ONLY, experiment: str = "srpo") -> list[Run]:
    number = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([number], run_view_type=view, max_results=1000)


def story(root: Path) -> Story:
    """Return `story_of` a project's own database."""
    # a copy: MLflow keeps its connections, and one to a deleted file still reads the old content
    copy = root.parent / f"{uuid4().hex}.db"
    shutil.copy(root / "mlflow.db", copy)
    return story_of(MlflowClient(tracking_uri=f"sqlite:///{copy}"))


def story_of(client: MlflowClient, experiment: str = "srpo") -> Story:
    """Return the campaign's run and each round's current one, without ids, times and system metrics.

    No run of the experiment, current or not, may have a point twice.
    """
    runs = runs_of(client, experiment=experiment)
    names, found = {run.info.run_id: run.info.run_name for run in runs}, {}
    for run in runs:
        metrics = {
            name: sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
            if not name.startswith("system/")
        }
        for name, points in metrics.items():
            assert len(points) == len(set(points)), f"{run.info.run_name}: a point of {name} twice"
        tags = run.data.tags
        if tags["srpo.kind"] == "round" and tags.get("srpo.current") != "true":
            continue
        assert run.info.run_name not in found, "two current runs"
        folders = (None, "report")
        found[run.info.run_name] = {
            "metrics": metrics,
            "params": run.data.params,
            "tags": {k: v for k, v in tags.items() if k.startswith(("srpo.", "dvc.")) and not k.startswith(OF_ONE_RUN)},
            "parent": names.get(tags.get("mlflow.parentRunId")),
            "artifacts": sorted(f.path for folder in folders for f in client.list_artifacts(run.info.run_id, folder)),
            "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            "status": run.info.status,
        }
    return found


def curve_of(root: Path, params: Params, key: str, steps: int = 30) -> list[dict[str, float]]:
    """Train a round again, as far as its files go; return its curve."""
    return write_training(params, root, key, steps=steps)


def log_rows(log_step, rows: list[dict[str, float]]) -> None:
    for row in rows:
        log_step({name: value for name, value in row.items() if name != "step"}, int(row["step"]))


def test_records_are_complete_and_idempotent(project: Path) -> None:
    params = params_of(project)
    assert sync_campaign(params, project)
    first = story(project)
    assert set(first) == {"tiny", "base", "round 001", "round 002"}
    assert [step for step, _ in first["tiny"]["metrics"]["accuracy"]] == [0, 1, 2]
    child = first["round 001"]
    assert child["parent"] == "tiny" and child["status"] == "FINISHED"
    assert [step for step, _ in child["metrics"]["train/loss"]] == list(range(1, 31))
    locked = json.loads((project / "dvc.lock").read_text())["stages"]["select@001"]["outs"][0]["md5"]
    assert dict(child["inputs"])["winners"] == child["tags"]["dvc.winners"] == locked
    assert first["round 002"]["tags"]["srpo.parent_adapter"] == child["tags"]["srpo.adapter"]
    files = {"lineage.json", "selection.json", "metrics.json", "gate.json", "guidance.csv"}
    assert files | {f"report/{name}" for name in ("index.html", "tuned.png", "winners.png")} <= set(child["artifacts"])
    assert sync_campaign(params, project)
    assert story(project) == first


def test_headline_numbers_have_plain_names(project: Path) -> None:
    params = params_of(project)
    sync_campaign(params, project)
    metrics = story(project)["round 001"]["metrics"]
    plain = {name for name in metrics if "/" not in name}
    assert plain == {*params.rewards, "judge_win_rate", "accuracy_win_rate", "fid", "kid", "cmmd", "diversity", "drift"}
    assert len(plain) == 10 and {name.split("/")[0] for name in set(metrics) - plain} == {"train", "sweep"}
    assert [step for step, _ in metrics["sweep/fid"]] == [100, 150, 200, 300]
    (run,) = [run for run in runs_of(client_of(project)) if run.info.run_name == "round 001"]
    numbers = run.data.tags["mlflow.note.content"].partition("\n")[0]
    assert [part.split()[0] for part in numbers.split(", ")] == headline_names(params)


def test_view_has_headline_columns(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The saved view has the form that MLflow's UI reads, and another project in the experiment has its own."""
    caplog.set_level(logging.INFO, "srpo")
    params, client = params_of(project), client_of(project)
    sync_campaign(params, project)
    (address,) = re.findall(r"the rounds are at (\S+)", caplog.text)
    experiment = client.get_experiment_by_name("srpo")
    path, _, query = address.partition("?")
    assert path == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    shown = dict(part.split("=") for part in query.split("&"))
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{shown['viewStateShareKey']}"])
    assert shown["workflowType"] == "machine_learning" and view["name"] == "tiny (project-1)"
    state = json.loads(view["state"])
    assert len(client.search_runs([experiment.experiment_id], state["searchFilter"])) == 3  # base and two rounds
    assert [f"metrics.`{name}`" for name in headline_names(params)] == state["selectedColumns"][:-1]
    other, root = clone_of(project, "other", "other-2")
    assert sync_campaign(other, root) and sync_campaign(params, project)
    tags = client.get_experiment_by_name("srpo").tags
    views = {name: value for name, value in tags.items() if name.startswith("mlflow.sharedViewState.")}
    key = f"mlflow.sharedViewState.{shown['viewStateShareKey']}"
    assert len(views) == 2 and json.loads(views[key]) == view


def test_lost_database_is_rebuilt_from_files(project: Path) -> None:
    sync_campaign(params_of(project), project)
    before = story(project)
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    # a new process: this one's MLflow still has the deleted file open
    subprocess.run([sys.executable, "-m", "srpo", "track"], cwd=project, check=True)
    assert story(project) == before


def test_live_curve_has_system_metrics_and_no_repeats(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    params, load, client = params_of(project), "system/cpu_utilization_percentage", client_of(project)
    sync_campaign(params, project)
    expected, rows = story(project), curve_of(project, params, "002")

    def live_run() -> Run:
        return next(run for run in runs_of(client) if "srpo.heartbeat" in run.data.tags)

    with live(Round.of(params, project, "002")) as log_step:
        log_rows(log_step, rows)
        end = time.monotonic() + 30
        while load not in live_run().data.metrics and time.monotonic() < end:
            time.sleep(0.2)
        assert live_run().info.status == "RUNNING"
    sync_round(Round.of(params, project, "002"))
    assert story(project) == expected
    assert load in live_run().data.metrics and live_run().data.tags["srpo.current"] == "true"


def test_retrained_round_gets_a_run_of_its_own(project: Path) -> None:
    sync_campaign(params_of(project), project)
    old = story(project)
    raw = json.loads((project / "params.yaml").read_text())  # the drawn campaign writes it as JSON
    raw["train"]["steps"] = 40
    write_json(project / "params.yaml", raw)
    params = params_of(project)
    curve_of(project, params, "002", steps=40)
    write_evaluation(params, project, "002", shift=0.1)
    assert sync_campaign(params, project)
    new, client = story(project), client_of(project)
    rounds = [run for run in runs_of(client, ViewType.ALL) if run.data.tags.get("srpo.round") == "002"]
    assert sorted((run.data.params["train.steps"], run.data.tags["srpo.current"]) for run in rounds) == [
        ("300", "false"),
        ("40", "true"),
    ]
    assert [step for step, _ in new["round 002"]["metrics"]["train/loss"]] == list(range(1, 41))
    # the campaign's curve keeps the old point, and its latest value is the new one
    assert set(old["tiny"]["metrics"]["judge"]) < set(new["tiny"]["metrics"]["judge"])
    parent = next(run for run in runs_of(client) if run.data.tags["srpo.kind"] == "campaign")
    assert parent.data.metrics["judge"] == new["round 002"]["metrics"]["judge"][0][1]


def test_resumed_training_continues_its_run(project: Path) -> None:
    params, client = params_of(project), client_of(project)
    rows = curve_of(project, params, "002")
    with pytest.raises(KeyboardInterrupt), live(Round.of(params, project, "002")) as log_step:
        log_rows(log_step, rows[:10])
        raise KeyboardInterrupt
    (killed,) = [run for run in runs_of(client) if run.data.tags.get("srpo.round") == "002"]
    assert killed.info.status == "KILLED" and len(client.get_metric_history(killed.info.run_id, "train/loss")) == 10
    with live(Round.of(params, project, "002")) as log_step:
        log_rows(log_step, rows)
    (resumed,) = [run for run in runs_of(client) if run.data.tags.get("srpo.round") == "002"]
    assert resumed.info.run_id == killed.info.run_id and resumed.info.status == "FINISHED"
    assert [step for step, _ in story(project)["round 002"]["metrics"]["train/loss"]] == list(range(1, 31))


def test_heartbeat_tells_living_trainings_from_dead(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, client = params_of(project), client_of(project)
    other, root = clone_of(project, "other")
    shutil.rmtree(root / "rounds" / "002" / "adapter")

    def status() -> str:
        return next(run.info.status for run in runs_of(client) if run.data.tags.get("srpo.round") == "002")

    shutil.rmtree(project / "rounds" / "002" / "adapter")
    with live(Round.of(params, project, "002")) as log_step:
        log_step({"loss": 0.5}, 1)
        assert sync_campaign(other, root) and status() == "RUNNING"
        monkeypatch.setattr(runs_of_campaign, "HEARTBEAT_SECONDS", 0)  # as if nothing had come for ten minutes
        assert sync_campaign(other, root) and status() == "KILLED"


def test_clones_of_a_project_share_its_runs(project: Path) -> None:
    params, client = params_of(project), client_of(project)
    other, root = clone_of(project, "other")
    (root / "rounds" / "001" / "training.csv").unlink()
    for name in ("evaluation", "report"):
        shutil.rmtree(project / "rounds" / "001" / name)
    assert sync_campaign(params, project)
    first = {run.info.run_id for run in runs_of(client)}
    client.log_metric(next(iter(first)), "system/gpu_0", 73.0)
    assert sync_campaign(other, root) and sync_campaign(params, project)
    after = runs_of(client)
    assert {run.info.run_id for run in after} == first and any("system/gpu_0" in run.data.metrics for run in after)
    (run,) = [run for run in after if run.data.tags.get("srpo.round") == "001"]
    assert {"train/loss", "fid"} <= set(run.data.metrics) and run.data.tags["srpo.verdict"] == "pass"


def test_projects_with_the_same_campaign_are_kept_apart(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    params, client = params_of(project), client_of(project)
    assert sync_campaign(params, project)
    first, before = {run.info.run_id for run in runs_of(client)}, story(project)
    other, root = clone_of(project, "other", "other-2")
    write_evaluation(other, root, "001", shift=0.1)
    assert sync_campaign(other, root)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("MLflow: the campaign tiny of project project-1 is in this experiment, too")
    caplog.clear()
    assert sync_campaign(other, root) and not [r for r in caplog.records if r.levelno == logging.WARNING]

    assert sync_campaign(other, root, rebuild=True)
    deleted = runs_of(client, ViewType.DELETED_ONLY)
    assert {run.data.tags["srpo.project"] for run in deleted} == {"other-2"} and len(deleted) == 4
    named = [r.getMessage() for r in caplog.records if "MLflow: deleted" in r.getMessage()]
    assert len(named) == 4 and any("round 001" in line for line in named)
    alive = {run.info.run_id: run for run in runs_of(client)}
    assert first <= set(alive) and len(alive) == 8
    assert {run.data.tags["srpo.project"] for name, run in alive.items() if name not in first} == {"other-2"}
    for name in set(alive) - first:
        client.delete_run(name)
    assert story(project) == before


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg2", "mysql+pymysql"])
def test_unreachable_server_is_one_warning(project: Path, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    params = params_of(project, f"{scheme}://someone:hunter2@127.0.0.1:9/mlflow")
    start = time.monotonic()
    with live(Round.of(params, project, "001")) as log_step:
        log_step({"loss": 1.0}, 1)
    assert sync_campaign(params, project) is False
    assert time.monotonic() - start < 60
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("srpo")]
    assert len(warnings) == 2 and all("srpo track" in text for text in warnings)
    assert "hunter2" not in caplog.text
