"""A real Prefect server and a real DVC workspace with stand-in stages."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from flows import prefect_server as server
from srpo.runtime import fork_server, fork_server_process
from tests.support.servers import free_port

REPO = Path(__file__).parents[2]

BUCKET = "srpo"

# stands where `srpo` would: writes each stage's outputs, notes that it ran, and misbehaves on request
STAND_IN = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
stage, key = (sys.argv[1:] + ["base"])[:2]
def note(file, word=""):
    with open(file, "a") as log: log.write(word + stage + "@" + key + "\\n")
note("ran.txt"); note("spans.txt", "start ")
trouble = pathlib.Path("trouble-" + stage + "-" + key)
if trouble.exists():
    what = trouble.read_text()
    if what == "bad input":
        print("srpo: error: params.yaml: seed: too odd", file=sys.stderr); sys.exit(2)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once":
        trouble.unlink(); os.kill(os.getpid(), signal.SIGKILL)
    if what == "meet":  # as many as there are troubles of this kind must run at the same time
        pathlib.Path("met-" + key).touch()
        others = len(list(pathlib.Path().glob("trouble-" + stage + "-*")))
        for _ in range(600):
            if len(list(pathlib.Path().glob("met-*"))) == others: break
            time.sleep(0.1)
        else: sys.exit("alone")
    if what == "linger":
        time.sleep(1)
    if what == "hang":
        loader = subprocess.Popen(["sleep", "120"])
        print("hanging", os.getpid(), loader.pid, flush=True); time.sleep(120)
folder = pathlib.Path("rounds", key)
outs = {{
    "base": ["adapter/lineage.json", "rewards.json", "selecting.json", "preview.json"],
    "generate": ["candidates/x"], "score": ["scores/select/x", "scores/judge/x", "scores/invalid.parquet"],
    "select": ["winners/x"], "train": ["adapter/x", "training.csv"], "report": ["report/index.html"],
    "evaluate": ["evaluation/per_prompt.parquet", "evaluation/samples.parquet", "evaluation/guidance.csv",
                 "evaluation/features.safetensors" if key == "base" else "evaluation/drift.json"],
    "gate": ["evaluation/gate.json"],
}}[stage]
for out in outs:
    (folder / out).parent.mkdir(parents=True, exist_ok=True)
    (folder / out).write_text(stage + key)
if stage == "gate" or (stage, key) == ("evaluate", "base"):
    metrics = dict.fromkeys(["reward", "judge", "accuracy", "fid", "kid", "diversity"], 1.0) | {{"verdict": "pass"}}
    (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
note("spans.txt", "end ")
"""


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a Prefect server that flows of this process use, too."""
    with server.ensure_server():
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def fork_server_socket() -> Iterator[str]:
    """The socket of a fork server: starting `dvc` and `srpo track` takes most of these tests' time."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(REPO))
            # what `dvc` and `srpo track` need; the stages are stand-ins
            wanted = [
                item
                for item in fork_server_process.PRELOAD
                if item.startswith(("dvc", "mlflow", "srpo.cli", "srpo.tracking.sync"))
            ]
            patch.setenv(fork_server_process.PRELOAD_VARIABLE, " ".join(wanted))
            patch.delenv(fork_server.SOCKET_VARIABLE, raising=False)
            stack.enter_context(fork_server.running())
            address = os.environ.pop(fork_server.SOCKET_VARIABLE, "")  # for these tests, not for all that come after
        yield address


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork_server_socket: str) -> Path:
    """The project's own dvc.yaml and params.yaml over stand-in stages, as the current directory."""
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / file, tmp_path)
    for file in ("data/prompts/train.jsonl", "data/prompts/eval.jsonl", "data/reference/reference.parquet"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    stand_in = tmp_path / "bin" / "srpo"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv(fork_server.SOCKET_VARIABLE, fork_server_socket)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    return tmp_path


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server, a process of its own, with an empty bucket."""
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "s3.txt").open("w") as words:
        server = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
            time.sleep(0.2)
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def ran(workspace: Path) -> list[str]:
    """The stages that ran since the last call, in order."""
    path = workspace / "ran.txt"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def stages(*keys: str) -> list[str]:
    """All stages of these rounds, in order."""
    names = ("generate", "score", "select", "train", "evaluate", "gate", "report")
    return [f"{name}@{key}" for key in keys for name in names]
