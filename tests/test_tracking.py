"""MLflow as a projection: the same story however it got there. Real MLflow on SQLite."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from srpo import tracking
from srpo.base import pin_base
from srpo.evaluate import evaluate
from srpo.generate import generate
from srpo.params import Params, load_params
from srpo.report import report
from srpo.score import score
from srpo.select import select
from srpo.train import train

Story = dict[str, dict]


@pytest.fixture(scope="module")
def campaign(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and two rounds of the random-weight world, without any MLflow record."""
    root = tmp_path_factory.mktemp("campaign") / "project"
    shutil.copytree(shared_world, root)
    text = (root / "params.yaml").read_text()  # these tests run outside the project's folder
    (root / "params.yaml").write_text(text.replace("base: data/base", f"base: {root}/data/base"))
    params = load_params(root / "params.yaml")
    pin_base(params, root)
    evaluate(params, root, "base")
    for key in ("001", "002"):
        for stage in (generate, score, select, train, evaluate, report):
            stage(params, root, key)
    return root


@pytest.fixture
def project(campaign: Path, tmp_path: Path) -> Path:
    root = tmp_path / "project"
    shutil.copytree(campaign, root)
    lock = "schema: '2.0'\nstages:\n  select@001:\n    cmd: srpo select 001\n    outs:\n"
    (root / "dvc.lock").write_text(lock + f"    - path: rounds/001/winners\n      md5: {'ab' * 16}.dir\n")
    return root


def params_of(root: Path, uri: str | None = None) -> Params:
    params = load_params(root / "params.yaml")
    if uri:
        params = params.model_copy(update={"tracking": params.tracking.model_copy(update={"uri": uri})})
    return params


def story(root: Path) -> Story:
    """All that MLflow shows, without ids and times."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("srpo").experiment_id
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
    assert tracking.sync(params, project)
    first = story(project)
    assert set(first) == {"tiny", "base", "round 001", "round 002"}
    assert [step for step, _ in first["tiny"]["metrics"]["accuracy"]] == [0, 1, 2]
    child = first["round 001"]
    assert child["parent"] == "tiny" and child["status"] == "FINISHED"
    assert [step for step, _ in child["metrics"]["loss"]] == [1, 2, 3]
    assert child["inputs"] == [("winners", f"{'ab' * 16}.dir")]
    assert child["tags"]["dvc.winners"] == f"{'ab' * 16}.dir"
    assert first["round 002"]["tags"]["srpo.parent_adapter"] == child["tags"]["srpo.adapter"]
    assert {"eval/cmmd", "eval/drift", "eval/sweep/1.0/kid", "eval/sweep/2.0/saturation"} <= set(child["metrics"])
    assert {"eval/gate/fid_ratio", "eval/win_rate/judge/best/low"} <= set(child["metrics"])
    assert {"cmmd", "drift", "judge_win_rate_low"} <= set(first["tiny"]["metrics"])
    assert {"lineage.json", "gate.json", "report/index.html", "report/tuned.png", "report/winners.png"} <= set(
        child["artifacts"]
    )
    assert tracking.sync(params, project)
    assert story(project) == first


def test_a_deleted_database_is_rebuilt_the_same(project: Path) -> None:
    tracking.sync(params_of(project), project)
    before = story(project)
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    tracking.sync(params_of(project), project)
    assert story(project) == before


def test_a_live_curve_is_not_told_twice(project: Path) -> None:
    params = params_of(project)
    tracking.sync(params, project)
    expected = story(project)
    with tracking.live(params, project, "002") as curve:
        train(params, project, "002", curve.log)
    running = story(project)["round 002"]
    assert [step for step, _ in running["metrics"]["loss"]] == [1, 2, 3], "not live"
    tracking.project(params, project, "002")
    assert story(project) == expected


def test_a_round_made_anew_replaces_what_was_told(project: Path) -> None:
    tracking.sync(params_of(project), project)
    old = story(project)
    text = (project / "params.yaml").read_text().replace("steps: 3\n  batch_size", "steps: 4\n  batch_size")
    (project / "params.yaml").write_text(text)
    params = params_of(project)
    for stage in (train, evaluate):
        stage(params, project, "002")
    tracking.sync(params, project)
    new = story(project)
    assert [step for step, _ in new["round 002"]["metrics"]["loss"]] == [1, 2, 3, 4]
    assert new["round 002"]["params"]["train.steps"] == "4"
    assert len(new["tiny"]["metrics"]["judge"]) == 3
    assert new["tiny"]["metrics"]["judge"][:2] == old["tiny"]["metrics"]["judge"][:2]
    assert {run["parent"] for name, run in new.items() if name != "tiny"} == {"tiny"}


def test_an_unreachable_server_is_one_warning_and_no_password(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = params_of(project, "http://someone:hunter2@127.0.0.1:9")
    start = time.monotonic()
    with tracking.live(params, project, "001") as curve:
        curve.log({"loss": 1.0}, 1)
    assert tracking.sync(params, project) is False
    assert time.monotonic() - start < 60
    warnings = [record.getMessage() for record in caplog.records if record.name == "srpo"]
    assert len(warnings) == 2 and all("srpo track" in text for text in warnings)
    assert "hunter2" not in caplog.text
