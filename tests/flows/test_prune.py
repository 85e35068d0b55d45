"""`srpo prune` over a real DVC workspace with a remote and stub stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.errors import BadInput
from flows.rounds import srpo_rounds
from srpo import cli
from srpo.config.loader import load_params
from srpo.errors import UserError
from srpo.lineage.dvc_lock import read_dvc_lock
from srpo.lineage.lock_merge import dump_dvc_lock
from srpo.tools.prune import prune
from tests.flows.conftest import ran

pytestmark = pytest.mark.slow
SIZE = len("generate001")


def dvc(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "srpo.runtime.fork_server", "dvc", *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def decided(workspace: Path) -> Path:
    """Round 001 is complete and pushed, and 002 has candidates."""
    dvc("remote", "add", "-q", "-d", "store", str(workspace / "remote"))
    dvc("repro", "-q", "report@001")
    dvc("repro", "-q", "-s", "generate@002")
    dvc("push", "-q")
    ran(workspace)
    return workspace


def contents(root: Path) -> dict[str, set[str]]:
    """The texts of all files of stages, by place."""
    places = {"workspace": root / "rounds", "cache": root / ".dvc/cache/files", "remote": root / "remote"}
    return {
        name: {path.read_text() for path in folder.rglob("*") if path.is_file() and path.suffix != ".dir"}
        for name, folder in places.items()
    }


def test_prune(decided: Path, prefect_server: str, capsys: pytest.CaptureFixture) -> None:
    before = contents(decided)
    assert cli.run(["prune"]) == 0
    assert "would be deleted; run again with --delete" in capsys.readouterr().out
    assert contents(decided) == before
    (counted,) = prune(load_params(), decided)
    assert counted.key == "001" and counted.workspace == SIZE and counted.cache > SIZE and counted.remote > SIZE
    with pytest.raises(UserError, match=r"^rounds\.002: not decided yet"):
        prune(load_params(), decided, ["002"])

    assert cli.run(["prune", "--delete"]) == 0
    assert contents(decided) == {name: texts - {"generate001"} for name, texts in before.items()}
    dvc("pull", "-q", "--allow-missing")
    assert contents(decided) == {name: texts - {"generate001"} for name, texts in before.items()}
    srpo_rounds(rounds=["001"])
    assert ran(decided) == [], "a pruned round is complete"
    params = decided / "params.yaml"
    params.write_text(params.read_text().replace("min_margin: 0.0", "min_margin: 0.1"))
    with pytest.raises(BadInput, match=r"candidates does not exist; .* --force samples pruned candidates again"):
        srpo_rounds(rounds=["001"])


def test_objects_of_other_entries_stay(decided: Path) -> None:
    stages = read_dvc_lock(decided)
    stages["generate@003"] = {"cmd": "x", "outs": [stages["generate@001"]["outs"][0] | {"path": "elsewhere"}]}
    (decided / "dvc.lock").write_bytes(dump_dvc_lock(stages))
    before = contents(decided)
    (freed,) = prune(load_params(), decided, delete=True)
    assert (freed.workspace, freed.cache, freed.remote) == (SIZE, 0, 0)
    assert contents(decided) == before | {"workspace": before["workspace"] - {"generate001"}}
