"""Fixtures of the tests of faults: a project whose base and round 001 are done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.helpers import build, make_world


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and round 001, all stages; read only."""
    root = tmp_path_factory.mktemp("faults") / "project"
    make_world(root)
    return build(root)


@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    return root
