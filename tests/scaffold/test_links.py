"""Projects whose workspace is links into DVC's cache: no command changes a file of the cache in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from srpo.config.loader import PARAMS_FILE
from srpo.rounds import RoundFiles
from srpo.storage.hashing import dvc_digest
from tests.support.world import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KEY = "001"


def run(root: Path, module: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{module} {arguments}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def damaged(root: Path) -> list[str]:
    """The files of the cache whose name is not their md5."""
    cached = [path for path in (root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert cached
    return [str(path) for path in cached if path.parent.name + path.name.removesuffix(".dir") != dvc_digest(path)]


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_rounds_work_with_links(world: Path, kind: str) -> None:
    shutil.copy(REPO / ".gitignore", world)
    run(world, "dvc", "init", "-q", "--no-scm")
    run(world, "dvc", "config", "cache.type", kind)
    run(world, "dvc", "add", "-q", "data")
    run(world, "dvc", "repro", "-q", f"report@{KEY}")
    (shard, *_) = (world / "rounds" / KEY / "candidates").iterdir()
    assert shard.is_symlink() if kind == "symlink" else shard.stat().st_nlink == 2
    assert not shard.stat().st_mode & 0o222, "DVC protects it"

    text = (world / PARAMS_FILE).read_text()
    assert "seed: 0" in text
    (world / PARAMS_FILE).write_text(text.replace("seed: 0", "seed: 1"))
    run(world, "dvc", "repro", "-q", f"report@{KEY}")
    run(world, "srpo", "score", KEY)
    assert not damaged(world)

    shutil.rmtree(world / "rounds" / KEY / "winners")
    run(world, "dvc", "checkout", "-q", f"select@{KEY}")
    run(world, "srpo", "prune", "--delete", KEY)
    assert not RoundFiles(world, KEY).candidates.exists() and not damaged(world)
    run(world, "dvc", "repro", "-q", "--allow-missing", f"report@{KEY}")
