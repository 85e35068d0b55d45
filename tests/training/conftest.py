"""Fixtures of the tests of training: a random-weight project whose first rounds are ready to train."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from srpo.config.loader import Params, load_params
from srpo.rounds import Round
from srpo.stages.train import train
from tests.training.helpers import ready, started


@pytest.fixture(scope="session")
def two_rounds(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounds 001 (trained) and 002 (ready to train); read only."""
    root = tmp_path_factory.mktemp("training") / "project"
    shutil.copytree(shared_world, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        params = started(root)
        train(Round.of(params, root, "001"))
        ready(params, root, "002")
    return root


@pytest.fixture
def root(two_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    target = tmp_path / "project"
    shutil.copytree(two_rounds, target)
    monkeypatch.chdir(target)
    return target


@pytest.fixture
def params(root: Path) -> Params:
    return load_params()
