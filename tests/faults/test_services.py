"""MLflow on a bad connection: slow, interrupted, or losing its answers. Nothing is recorded twice."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.release.registry import Decision, promote, versions
from srpo.rounds import Round
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking.connection import SETTINGS
from srpo.tracking.live import live
from srpo.tracking.sync import sync_campaign, sync_round
from tests.support.campaign import build_campaign
from tests.support.proxy import Proxy
from tests.support.servers import free_port, mlflow_server
from tests.tracking.test_sync import log_rows, story_of

pytestmark = pytest.mark.slow
AUTO = Decision("auto", "tests say so")
MOMENTS = 6


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy before a real MLflow server."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with mlflow_server(folder, port, f"sqlite:///{folder / 'server.db'}"), Proxy(port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign") / "project"
    params = build_campaign(root, size=8)
    for key in ("001", "002"):
        report(Round.of(params, root, key))
    return root


@pytest.fixture(autouse=True)
def sound_line(line: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    line.delay, line.down, line.loses = 0.0, False, lambda number: False


def params_for(project: Path, line: Proxy, experiment: str) -> Params:
    """The project's params, with a new experiment on the server; params.yaml, too, for what reads that."""
    raw = load_params(project / "params.yaml").model_dump()
    raw["tracking"] |= {"uri": f"http://127.0.0.1:{line.port}", "experiment": experiment}
    write_json(project / "params.yaml", raw)
    return load_params(project / "params.yaml")


def records_of(params: Params) -> dict:
    return story_of(MlflowClient(tracking_uri=params.tracking.uri), params.tracking.experiment)


@pytest.fixture(scope="module")
def wanted(line: Proxy, project: Path) -> tuple[dict, int]:
    """Return the records of an undisturbed synchronization, and the number of its requests."""
    params, before = params_for(project, line, "undisturbed"), line.answers
    assert sync_campaign(params, project)
    return records_of(params), line.answers - before


def moments(count: int) -> list[int]:
    return sorted(random.Random(3).sample(range(1, count), min(MOMENTS, count - 1)))


def test_slow_server_gets_all(line: Proxy, project: Path, wanted) -> None:
    params = params_for(project, line, "slow")
    line.delay = 0.1
    assert sync_campaign(params, project)
    line.delay = 0.0
    assert records_of(params) == wanted[0]


def test_late_answers_are_one_warning(line: Proxy, project: Path, monkeypatch, caplog, wanted) -> None:
    params = params_for(project, line, "late")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    line.delay = 3.0
    assert not sync_campaign(params, project)
    assert [record.getMessage().split("(")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "MLflow: campaign not recorded "
    ]
    line.delay = 0.0
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    assert sync_campaign(params, project)
    assert records_of(params) == wanted[0]


@pytest.mark.parametrize("lost", ["one answer", "all from then on"])
def test_lost_answers_are_repaired_without_repeats(line: Proxy, project: Path, wanted, lost: str) -> None:
    story, count = wanted
    for moment in moments(count):
        params, before = params_for(project, line, f"{lost} {moment}"), line.answers
        line.loses = lambda number, at=before + moment: number == at or (number > at and lost != "one answer")
        sync_campaign(params, project)
        line.loses = lambda number: False
        assert sync_campaign(params, project), f"answer {moment} of {count}"
        assert records_of(params) == story, f"answer {moment} of {count}"


def test_lost_answers_of_a_promotion_add_no_version(line: Proxy, project: Path, wanted) -> None:
    params, before = params_for(project, line, "promotion"), line.answers
    promote(Round.of(params, project, "001"), AUTO)
    for moment in moments(line.answers - before):
        params, before = params_for(project, line, f"promotion {moment}"), line.answers
        line.loses = lambda number, at=before + moment: number == at
        try:
            promote(Round.of(params, project, "001"), AUTO)
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("tracking.uri: ")
        line.loses = lambda number: False
        promote(Round.of(params, project, "001"), AUTO)
        promote(Round.of(params, project, "002"), AUTO)
        found = {str(version.version): version.aliases for version in versions(params, project)}
        assert found == {"1": ["previous"], "2": ["champion"]}, f"answer {moment}"
        assert all(version.source.startswith("models:/") for version in versions(params, project))


def test_requests_of_a_round(line: Proxy, project: Path, tmp_path: Path) -> None:
    root = shutil.copytree(project, tmp_path / "project")
    params = params_for(root, line, "requests")
    round, later = Round.of(params, root, "001"), {"evaluation": tmp_path / "evaluation", "report": tmp_path / "report"}
    assert sync_round(Round.of(params, root, "base"))
    for name, place in later.items():
        (round.files.folder / name).rename(place)
    before = len(line.requests)
    with live(round) as log_step, round.files.training.open() as file:
        log_rows(log_step, [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)])
    for name, place in later.items():
        place.rename(round.files.folder / name)
        assert sync_round(round)
    requests = line.requests[before:]
    assert len(requests) < 40, "\n".join(requests)
    assert {"train/loss", "fid", "sweep/fid"} <= set(records_of(params)["round 001"]["metrics"])
    before = len(line.requests)
    assert sync_round(round)
    assert len(line.requests) - before <= 3, "an unchanged round costs requests"
