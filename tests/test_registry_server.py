"""Promotion, lineage and restore through a tracking server, as a team has it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from srpo import cli
from srpo.base import write_json
from srpo.params import load_params
from srpo.registry import Decision, promote
from tests.campaign import build_campaign
from tests.test_registry import dvc, keep_in_dvc

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/kept"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1", *store],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None, "MLflow's server did not start"
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


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
        version = promote(params, root, key, Decision("auto", "test"))
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
