"""Real servers: MLflow that stops in the middle of a round, and both servers on PostgreSQL."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow import MlflowClient

from srpo.config.loader import Params
from srpo.rounds import Round, RoundFiles
from srpo.tracking.live import live
from srpo.tracking.sync import sync_campaign, sync_round
from tests.support.campaign import build_campaign
from tests.support.servers import free_port, kill, mlflow_server, prefect_server
from tests.tracking.test_sync import params_of, story_of

REPO = Path(__file__).parents[2]
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def train_while_it_dies(params: Params, root: Path, server: subprocess.Popen, step: int) -> None:
    """Log a training as `srpo train 001` does, and kill MLflow's server after a step."""
    rows = list(csv.DictReader(RoundFiles(root, "001").training.open()))
    with live(Round.of(params, root, "001")) as log_step:
        for row in rows:
            log_step({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))
            if int(row["step"]) == step:
                mlflow.flush_async_logging()
                kill(server)
    sync_round(Round.of(params, root, "001"))


def down_in_the_middle(folder: Path, store: str, caplog: pytest.LogCaptureFixture) -> None:
    root, port = folder / "campaign", free_port()
    build_campaign(root, rounds=("001",))
    address = f"http://127.0.0.1:{port}"
    params = params_of(root, address)
    with mlflow_server(folder, port, store) as server:
        assert sync_campaign(params, root)
        client = MlflowClient(tracking_uri=address)
        wanted = story_of(client)
        assert {"tiny", "base", "round 001"} == set(wanted)
        assert "gate.json" in wanted["round 001"]["artifacts"], "artifacts did not pass through the server"
        assert not (root / "mlartifacts").exists() and (folder / "artifacts").is_dir()
        train_while_it_dies(params, root, server, step=10)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings  # one for the curve, one for the stage's end
    assert all(text.startswith("MLflow: ") and "run `srpo track` later" in text for text in warnings)
    with mlflow_server(folder, port, store):
        experiment = client.get_experiment_by_name("srpo").experiment_id
        (behind,) = client.search_runs([experiment], "attributes.status = 'RUNNING'")
        assert len(client.get_metric_history(behind.info.run_id, "train/loss")) == 10, "nothing was lost"
        assert sync_campaign(params, root) and sync_campaign(params, root)
        assert story_of(client) == wanted


@pytest.mark.slow
def test_server_killed_in_a_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    down_in_the_middle(tmp_path, f"sqlite:///{tmp_path / 'server.db'}", caplog)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """user@host:port of a PostgreSQL cluster of one's own, on loopback, gone afterwards."""
    if POSTGRES is None:
        pytest.skip("no initdb under /usr/lib/postgresql: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="pip install 'srpo[servers]'")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="srpo-postgres-")), free_port()
    if user:
        shutil.chown(folder, user)
    data = folder / "data"

    def run(name: str, *arguments: str) -> None:
        subprocess.run([POSTGRES / name, *arguments], check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    run("initdb", "-D", str(data), "-U", "srpo", "--auth=trust", "--encoding=UTF8", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    run("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        for name in ("mlflow", "prefect"):
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "srpo", name)
        yield f"srpo@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_server_on_postgresql_killed_in_a_round(
    postgres: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    down_in_the_middle(tmp_path, f"postgresql+psycopg2://{postgres}/mlflow", caplog)


FLOW = """
from prefect import flow, task
@task
def stage(name: str) -> str:
    return name
@flow
def rounds() -> list[str]:
    return [stage(name) for name in ("generate", "score")]
assert rounds() == ["generate", "score"]
"""


@pytest.mark.slow
def test_prefect_on_postgresql_keeps_runs(postgres: str, tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
    }
    api = f"http://127.0.0.1:{port}/api"
    with prefect_server(tmp_path, port, **settings):
        environment = os.environ | settings | {"PREFECT_API_URL": api}
        subprocess.run([sys.executable, "-c", FLOW], check=True, env=environment, cwd=tmp_path)
    with prefect_server(tmp_path, port, **settings):  # what is asked for now is not in its memory
        found = httpx.post(f"{api}/flow_runs/filter", json={}, trust_env=False).json()
    assert [run["state_type"] for run in found] == ["COMPLETED"]


def test_compose_is_on_loopback_without_secrets() -> None:
    from ruamel.yaml import YAML

    text = (REPO / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    compose = YAML(typ="safe").load(text)
    services = compose["services"]
    assert set(services) == {"postgres", "mlflow", "prefect"}
    assert all("healthcheck" in service and service["restart"] == "unless-stopped" for service in services.values())
    for name in ("mlflow", "prefect"):
        assert services[name]["depends_on"]["postgres"]["condition"] == "service_healthy"
        assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in services[name]["ports"])
    assert "ports" not in services["postgres"], "the database is for the servers alone"
    assert "--serve-artifacts" in services["mlflow"]["command"] and "--allowed-hosts" in services["mlflow"]["command"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    example = (REPO / "deploy" / "env.example").read_text()
    assert "POSTGRES_PASSWORD=\n" in example and "PREFECT_AUTH=\n" in example
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/.env"], cwd=REPO)
    assert ignored.returncode == 0


def test_compose_pins_the_tested_versions() -> None:
    text = (REPO / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"mlflow=={pins['mlflow']} psycopg2-binary=={pins['psycopg2-binary']}" in text
    assert f"prefecthq/prefect:{pins['prefect']}-python3.11" in text
    assert f"image: srpo-mlflow:{pins['mlflow']}" in text and ":latest" not in text


def test_docker_reads_compose() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    environment = os.environ | {"POSTGRES_PASSWORD": "x", "PREFECT_AUTH": "a:b"}
    command = ["docker", "compose", "-f", "deploy/compose.yaml", "config", "--quiet"]
    subprocess.run(command, check=True, cwd=REPO, env=environment)
