"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
# Prefect reads these when it is imported: its database and server are the tests' own
_prefect_home = tempfile.TemporaryDirectory(prefix="srpo-prefect-", ignore_cleanup_errors=True)
os.environ["PREFECT_HOME"] = _prefect_home.name
os.environ.pop("PREFECT_API_URL", None)


@pytest.fixture(autouse=True)
def _no_log_handlers_of_other_tests() -> Iterator[None]:
    """A command that runs in this process logs to the standard error of its test, which is closed afterwards."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight project folder, made once; read only."""
    from tests.support.world import build_world

    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the random-weight project folder of one's own, as the current directory."""
    root = tmp_path / "project"
    shutil.copytree(shared_world, root)
    monkeypatch.chdir(root)
    return root
