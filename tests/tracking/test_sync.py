"""MLflow as a projection: the same story however it got there. Real MLflow on SQLite."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from srpo.config.loader import Params, load_params
from srpo.rounds import Round
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking import sync
from tests.support.campaign import build_campaign, write_evaluation, write_training

Story = dict[str, dict]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and two rounds, drawn, and an MLflow database that has its tables and nothing in them."""
    root = tmp_path_factory.mktemp("campaign") / "project"
    params = build_campaign(root)
    for key in ("001", "002"):
        report(Round.of(params, root, key))
    # the tables cost more time than all else here
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


def story(root: Path) -> Story:
    """All that MLflow shows, without ids and times."""
    # a copy: MLflow keeps its connections, and one to a deleted file still reads what was in it
    copy = root.parent / f"{uuid4().hex}.db"
    shutil.copy(root / "mlflow.db", copy)
    return story_of(MlflowClient(tracking_uri=f"sqlite:///{copy}"))


def story_of(client: MlflowClient, experiment_name: str = "srpo") -> Story:
    """All that a tracking server or database shows, without ids and times."""
    experiment = client.get_experiment_by_name(experiment_name).experiment_id
    runs = client.search_runs([experiment])
    names = {run.info.run_id: run.info.run_name for run in runs}
    found: Story = {}
    for run in runs:
        assert run.info.run_name not in found, "a run twice"
        found[run.info.run_name] = {
            "metrics": {
                name: sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, name))
                for name in run.data.metrics
            },
            "params": run.data.params,
            "tags": {name: value for name, value in run.data.tags.items() if name.startswith(("srpo.", "dvc."))},
            "parent": names.get(run.data.tags.get("mlflow.parentRunId")),
            "artifacts": sorted(
                item.path for folder in (None, "report") for item in client.list_artifacts(run.info.run_id, folder)
            ),
            "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            "status": run.info.status,
        }
    return found


def test_the_projection_tells_all_and_is_idempotent(project: Path) -> None:
    params = params_of(project)
    assert sync.sync(params, project)
    first = story(project)
    assert set(first) == {"tiny", "base", "round 001", "round 002"}
    assert [step for step, _ in first["tiny"]["metrics"]["accuracy"]] == [0, 1, 2]
    child = first["round 001"]
    assert child["parent"] == "tiny" and child["status"] == "FINISHED"
    assert [step for step, _ in child["metrics"]["loss"]] == list(range(1, 31))
    locked = json.loads((project / "dvc.lock").read_text())["stages"]["select@001"]["outs"][0]["md5"]
    assert dict(child["inputs"])["winners"] == child["tags"]["dvc.winners"] == locked
    assert first["round 002"]["tags"]["srpo.parent_adapter"] == child["tags"]["srpo.adapter"]
    assert {"eval/cmmd", "eval/drift", "eval/sweep/1.0/kid", "eval/sweep/2.0/saturation"} <= set(child["metrics"])
    assert {"eval/gate/fid_ratio", "eval/win_rate/judge/best/low"} <= set(child["metrics"])
    assert {"cmmd", "drift", "judge_win_rate_low"} <= set(first["tiny"]["metrics"])
    assert {"lineage.json", "gate.json", "report/index.html", "report/tuned.png", "report/winners.png"} <= set(
        child["artifacts"]
    )
    assert sync.sync(params, project)
    assert story(project) == first


def test_a_deleted_database_is_rebuilt_the_same(project: Path) -> None:
    sync.sync(params_of(project), project)
    before = story(project)
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    # a new process, as a user's is: this one's MLflow still holds the deleted file
    subprocess.run([sys.executable, "-m", "srpo", "track"], cwd=project, check=True)
    assert story(project) == before


def test_the_machines_load_is_beside_the_curve_and_stays(project: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    params, load = params_of(project), "system/cpu_utilization_percentage"
    with sync.live(Round.of(params, project, "002")) as curve:
        for row in write_training(params, project, "002"):
            curve.log({name: row[name] for name in row if name != "step"}, row["step"])
        end = time.monotonic() + 30
        while load not in story(project)["round 002"]["metrics"] and time.monotonic() < end:
            time.sleep(0.2)
    sync.project(Round.of(params, project, "002"))
    child = story(project)["round 002"]
    assert child["metrics"][load] and [step for step, _ in child["metrics"]["loss"]] == list(range(1, 31))


def test_a_live_curve_is_not_told_twice(project: Path) -> None:
    params = params_of(project)
    sync.sync(params, project)
    expected = story(project)
    with sync.live(Round.of(params, project, "002")) as curve:
        for row in write_training(params, project, "002"):
            curve.log({name: value for name, value in row.items() if name != "step"}, row["step"])
    running = story(project)["round 002"]
    assert [step for step, _ in running["metrics"]["loss"]] == list(range(1, 31)), "not live"
    assert "eval/fid" not in running["metrics"]
    sync.project(Round.of(params, project, "002"))
    assert story(project) == expected


def test_a_round_made_anew_replaces_what_was_told(project: Path) -> None:
    sync.sync(params_of(project), project)
    old = story(project)
    raw = json.loads((project / "params.yaml").read_text())  # the drawn campaign writes it as JSON
    raw["train"]["steps"] = 40
    write_json(project / "params.yaml", raw)
    params = params_of(project)
    write_training(params, project, "002", steps=40)
    write_evaluation(params, project, "002", shift=0.1)
    sync.sync(params, project)
    new = story(project)
    assert [step for step, _ in new["round 002"]["metrics"]["loss"]] == list(range(1, 41))
    assert new["round 002"]["params"]["train.steps"] == "40"
    assert len(new["tiny"]["metrics"]["judge"]) == 3
    assert new["tiny"]["metrics"]["judge"][:2] == old["tiny"]["metrics"]["judge"][:2]
    assert new["tiny"]["metrics"]["judge"][2] != old["tiny"]["metrics"]["judge"][2]
    assert {run["parent"] for name, run in new.items() if name != "tiny"} == {"tiny"}


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg2", "mysql+pymysql"])
def test_an_unreachable_server_is_one_warning_and_no_password(
    project: Path, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    params = params_of(project, f"{scheme}://someone:hunter2@127.0.0.1:9/mlflow")
    start = time.monotonic()
    with sync.live(Round.of(params, project, "001")) as curve:
        curve.log({"loss": 1.0}, 1)
    assert sync.sync(params, project) is False
    assert time.monotonic() - start < 60
    warnings = [record.getMessage() for record in caplog.records if record.name == "srpo"]
    assert len(warnings) == 2 and all("srpo track" in text for text in warnings)
    assert "hunter2" not in caplog.text
