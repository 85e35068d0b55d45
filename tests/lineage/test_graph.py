"""Provenance of a round by dvc.lock and lineage.json, and DVC's hashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from srpo.errors import UserError
from srpo.lineage.dvc_lock import round_hashes
from srpo.lineage.graph import render, round_provenance, verify
from srpo.storage.hashing import dvc_digest
from tests.support.campaign import build_campaign, write_training


def test_parent_hash_is_the_one_that_was_read(tmp_path: Path) -> None:
    params = build_campaign(tmp_path, size=8)
    write_training(params, tmp_path, "001", steps=40)
    tree = round_provenance(tmp_path, "002")
    verify(tmp_path, tree)
    states = {node.path: node.state for node in tree.walk() if node.path}
    assert states["rounds/001/adapter"] == "differs" and states["rounds/002/adapter"] == "ok"
    assert "round 001" in str([node.label for node in render(tree).children])


def test_round_without_adapter_is_one_line(tmp_path: Path) -> None:
    build_campaign(tmp_path, rounds=(), size=8)
    with pytest.raises(UserError, match=r"rounds/001/adapter: no lineage\.json; `dvc repro train@001`"):
        round_provenance(tmp_path, "001")


def test_round_hashes_are_the_locks_outputs(tmp_path: Path) -> None:
    build_campaign(tmp_path, rounds=("001",), size=8)
    hashes = round_hashes(tmp_path, "001")
    evaluation = {"evaluation.gate.json", "evaluation.guidance.csv"}
    assert set(hashes) == {"candidates", "scores.select", "winners", "adapter"} | evaluation
    assert hashes["winners"] == dvc_digest(tmp_path / "rounds" / "001" / "winners")


def test_dvc_digest_equals_dvc(tmp_path: Path) -> None:
    for name in ("x/b/ü", "x/b.c", "x/a", "x/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for arguments in (["init", "-q", "--no-scm"], ["add", "-q", "x"]):
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, check=True)
    assert f"md5: {dvc_digest(tmp_path / 'x')}\n" in (tmp_path / "x.dvc").read_text()
