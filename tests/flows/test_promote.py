"""The promote flow over a drawn campaign, a real Prefect server and a real MLflow registry."""

from __future__ import annotations

import contextlib
import contextvars
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from flows import promote as module
from flows.promote import srpo_promote
from srpo.config.loader import load_params
from srpo.errors import UserError
from srpo.release.registry import versions
from tests.flows.conftest import REPO
from tests.release.test_registry import fail_the_gate
from tests.support.campaign import build_campaign


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "project"
    versions(build_campaign(root, size=8), root)
    return root


@pytest.fixture
def project(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(drawn, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    return tmp_path / "project"


def aliases(project: Path) -> dict[str, list[str]]:
    return {version.tags["srpo.round"]: version.aliases for version in versions(load_params(), project)}


def answered(key: str, *answers: dict) -> list:
    """Run the flow in a thread and resume it with these answers in turn; returns what each resuming said, then the
    flow's state."""
    known, found = {run.id for run in runs()}, []
    # Prefect's settings, the server's address among them, are the context's
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: found.append(context.run(srpo_promote, round=key, return_state=True)))
    thread.start()
    paused, end = None, time.monotonic() + 60
    while paused is None and time.monotonic() < end and thread.is_alive():
        time.sleep(0.1)
        paused = next((run for run in runs() if run.id not in known and run.state.is_paused()), None)
    assert paused, "the flow did not pause"
    assert aliases(Path.cwd()).get(key) is None, "registered before anyone approved"
    with get_client(sync_client=True) as client:
        said = [client.resume_flow_run(paused.id, run_input=answer) for answer in answers]
    thread.join(60)
    return [*said, *found]


def runs() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs(limit=200) if run.name.startswith("srpo-promote")]


def test_a_human_approves_and_the_alias_moves(project: Path, prefect_server) -> None:
    assert srpo_promote(round="001", auto=True) == "srpo-tiny 1"
    assert aliases(project) == {"001": ["champion"]}
    refused, accepted, state = answered("002", {"approve": True}, {"approve": True, "reason": "looks right"})
    assert refused.status.value == "REJECT" and accepted.status.value == "ACCEPT"
    assert state.is_completed() and state.message == "srpo-tiny 2 is the champion: round 002"
    assert aliases(project) == {"001": ["previous"], "002": ["champion"]}
    tags = versions(load_params(), project)[1].tags
    assert (tags["srpo.promoted_by"], tags["srpo.promotion_reason"]) == ("human", "looks right")


def test_rejection_registers_nothing(project: Path, prefect_server) -> None:
    _, state = answered("001", {"approve": False, "reason": "smeared hands"})
    assert state.name == "Rejected" and state.message == "round 001: not promoted: smeared hands"
    assert aliases(project) == {}


def test_failed_gate_needs_an_override(project: Path, prefect_server, capfd) -> None:
    fail_the_gate(load_params(), project, "001")
    with pytest.raises(UserError, match=r"^round 001: failed its gate \(fid_ratio\); `override` takes a reason"):
        srpo_promote(round="001", auto=True)
    assert "UserError: round 001" not in capfd.readouterr().err, "no traceback"
    assert aliases(project) == {}
    srpo_promote(round="001", auto=True, override="the demo is tomorrow")
    assert versions(load_params(), project)[0].tags["srpo.override"] == "the demo is tomorrow"


def test_nobody_decides_in_time(project: Path, prefect_server, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        monkeypatch.setattr(module.prefect_server, "ensure_server", contextlib.nullcontext)
        module.main(round="001", wait_hours=1 / 3600)
    assert error.value.code == 2 and aliases(project) == {}
    assert "srpo: error: round 001: no decision within 0.000277778 hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--round", "009"), "rounds.009: no such round in params.yaml"),
        (("--round", "001"), "no Prefect server is configured, so nobody could approve"),
    ],
)
def test_bad_input_is_one_line_and_status_2(project: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    done = subprocess.run([sys.executable, "-m", "flows.promote", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"srpo: error: {message}") and done.stderr.count("\n") == 1
