"""Promotion, lineage and restore through a tracking server, as a team has it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from srpo import cli
from srpo.config.loader import load_params
from srpo.release.registry import Decision, promote
from srpo.rounds import Round
from srpo.storage.json_files import write_json
from tests.release.test_registry import dvc, keep_in_dvc
from tests.support.campaign import build_campaign
from tests.support.servers import free_port, mlflow_server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with mlflow_server(tmp_path, port, f"sqlite:///{tmp_path}/server.db"):
        yield f"http://127.0.0.1:{port}"


def test_a_version_goes_through_a_server_and_back(server: str, tmp_path: Path, monkeypatch, capsys) -> None:
    import mlflow

    root = tmp_path / "project"
    params = build_campaign(root, size=8)
    raw = params.model_dump() | {"tracking": {"uri": server, "experiment": "srpo", "campaign": "tiny"}}
    write_json(root / "params.yaml", raw)
    monkeypatch.chdir(root)
    params = load_params()
    dvc(root, "init", "-q", "--no-scm")
    keep_in_dvc(root, "001")
    for key in ("001", "002", "002"):
        version = promote(Round.of(params, root, key), Decision("auto", "test"))
    assert (str(version.version), version.aliases) == ("2", ["champion"])
    shutil.rmtree(root / "rounds")
    assert cli.run(["lineage", "previous", "--no-check"]) == 0
    assert "srpo-tiny 1 @previous" in capsys.readouterr().out
    assert cli.run(["restore", "previous"]) == 0
    assert "version 1, round 001" in capsys.readouterr().out
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    try:
        assert mlflow.diffusers.load_model("models:/srpo-tiny@champion").base_model == "./data/base"
    finally:
        mlflow.set_tracking_uri(before)
