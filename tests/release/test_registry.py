"""Promotion into a real MLflow registry, lineage from it, and restoring from a real DVC cache and remote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from srpo import cli
from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.lineage import graph
from srpo.lineage.record import WEIGHTS_FILE, read_lineage
from srpo.release.provenance import provenance
from srpo.release.registry import Decision, check, look_up, promote, versions
from srpo.rounds import Round, RoundFiles
from srpo.storage.hashing import dvc_digest, file_digest
from srpo.storage.json_files import write_json
from tests.support.campaign import build_campaign, write_dvc_lock, write_training

if TYPE_CHECKING:
    from mlflow.diffusers import DiffusersAdapterModel

AUTO = Decision("auto", "tests say so")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "project"
    versions(build_campaign(root, size=8), root)  # makes mlflow.db, the slowest of all
    dvc(root, "init", "-q", "--no-scm")
    return root


@pytest.fixture
def project(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(drawn, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def params(project: Path) -> Params:
    return load_params()


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)


def keep_in_dvc(root: Path, key: str) -> None:
    """Put an adapter into DVC's cache, as `dvc repro` does."""
    shutil.copytree(RoundFiles(root, key).adapter, root / "kept")
    dvc(root, "add", "-q", "kept")
    shutil.rmtree(root / "kept")
    (root / "kept.dvc").unlink()


def load_model(root: Path, uri: str) -> DiffusersAdapterModel:
    """What a user of the registry does."""
    import mlflow

    # absolute, because MLflow keeps a database open by its address as it was given
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    try:
        return mlflow.diffusers.load_model(uri)
    finally:
        mlflow.set_tracking_uri(before)


def retrain(params: Params, root: Path, key: str) -> None:
    write_training(params, root, key, steps=40)
    write_dvc_lock(params, root, ("001", "002"))


def fail_the_gate(params: Params, root: Path, key: str) -> None:
    path = RoundFiles(root, key).evaluation / "gate.json"
    gate = json.loads(path.read_text()) | {"verdict": "fail"}
    gate["rules"]["fid_ratio"]["passed"] = False
    write_json(path, gate)


def test_champion_moves_between_versions(params: Params, project: Path) -> None:
    first, second = promote(Round.of(params, project, "001"), AUTO), promote(Round.of(params, project, "002"), AUTO)
    assert (str(first.version), str(second.version)) == ("1", "2")
    assert {str(v.version): v.aliases for v in versions(params, project)} == {"1": ["previous"], "2": ["champion"]}
    again = promote(Round.of(params, project, "002"), AUTO)
    assert str(again.version) == "2" and again.aliases == ["champion"]
    promote(Round.of(params, project, "001"), AUTO)
    assert {str(v.version): v.aliases for v in versions(params, project)} == {"1": ["champion"], "2": ["previous"]}

    tags, lineage = second.tags, read_lineage(RoundFiles(project, "002"))
    adapter = RoundFiles(project, "002").adapter
    assert tags["srpo.adapter"] == file_digest(adapter / WEIGHTS_FILE) and tags["srpo.winners"] == lineage["winners"]
    for name in ("candidates", "winners", "adapter"):
        assert tags[f"dvc.{name}"] == dvc_digest(project / "rounds" / "002" / name)
    expected = {"srpo.round": "002", "srpo.parent": "001", "srpo.parent_version": "1", "srpo.license": "other"}
    expected |= {
        "srpo.promoted_by": "auto",
        "srpo.promotion_reason": "tests say so",
        "srpo.base": f"data/base {'ba' * 32}",
    }
    assert expected.items() <= tags.items() and "srpo.override" not in tags
    assert json.loads(tags["srpo.params"]) == lineage["params"]

    loaded = load_model(project, f"models:/{second.name}@previous")
    assert loaded.base_model == "./data/base"
    assert dvc_digest(Path(loaded.adapter_path)) == dvc_digest(adapter), "the registry holds another adapter"


def test_other_project_has_a_model_of_its_own(params: Params, project: Path, monkeypatch) -> None:
    promote(Round.of(params, project, "001"), AUTO)
    root = shutil.copytree(project, project.parent / "other")
    (root / ".srpo-project").write_text("other-2")
    shared = params.tracking.model_copy(update={"uri": f"sqlite:///{project}/mlflow.db"})
    others = params.model_copy(update={"tracking": shared})
    monkeypatch.chdir(root)
    version = promote(Round.of(others, root, "002"), AUTO)
    assert (version.name, str(version.version), version.aliases) == ("srpo-tiny-other-2", "1", ["champion"])
    (mine,) = versions(params, project)
    assert (mine.name, mine.aliases, mine.tags["srpo.round"]) == ("srpo-tiny", ["champion"], "001")


def test_hub_base_is_pinned_to_its_revision(params: Params, project: Path) -> None:
    for key in ("base", "001"):
        path = RoundFiles(project, key).adapter / "lineage.json"
        base = {"source": "stabilityai/stable-diffusion-xl-base-1.0", "revision": "46" * 20, "digest": None}
        write_json(path, json.loads(path.read_text()) | {"base": base})
    write_dvc_lock(params, project, ("001",))
    version = promote(Round.of(params, project, "001"), AUTO)
    loaded = load_model(project, f"models:/{version.name}/1")
    assert (loaded.base_model, loaded.base_model_revision) == (base["source"], base["revision"])
    assert version.tags["srpo.license"] == "openrail++"


def test_failed_gate_needs_a_recorded_reason(params: Params, project: Path) -> None:
    fail_the_gate(params, project, "001")
    for override in (None, " "):
        with pytest.raises(UserError, match=r"^round 001: failed its gate \(fid_ratio\); `override` takes a reason"):
            promote(Round.of(params, project, "001"), Decision("auto", "", override))
    assert versions(params, project) == []
    version = promote(Round.of(params, project, "001"), Decision("auto", "", "a demo needs it"))
    assert version.tags["srpo.override"] == "a demo needs it"


def test_promotion_needs_evaluated_restorable_adapter(params: Params, project: Path) -> None:
    adapter = check(Round.of(params, project, "001"))
    with pytest.raises(UserError, match=r"rounds\.009: no such round"):
        check(Round.of(params, project, "009"))
    with pytest.raises(UserError, match=r"002b/adapter: no adapter"):
        check(Round.of(params, project, "002b"))
    with pytest.raises(UserError, match=r"001/adapter: changed since the decision"):
        promote(Round.of(params, project, "001"), AUTO, adapter="0" * 64)
    write_training(params, project, "001", steps=40)
    with pytest.raises(UserError, match=r"001/adapter: differs from dvc\.lock.*dvc repro train@001"):
        check(Round.of(params, project, "001"))
    lock = json.loads((project / "dvc.lock").read_text())
    lock["stages"]["train@001"]["outs"][0]["md5"] = dvc_digest(RoundFiles(project, "001").adapter)
    write_json(project / "dvc.lock", lock)
    with pytest.raises(UserError, match=r"001/evaluation: this adapter is not evaluated"):
        check(Round.of(params, project, "001"))
    (RoundFiles(project, "001").adapter / WEIGHTS_FILE).write_bytes(b"other")
    with pytest.raises(UserError, match=r"001/adapter: its weights differ from lineage\.json"):
        check(Round.of(params, project, "001"))
    assert adapter != check(Round.of(params, project, "002")) and versions(params, project) == []


def test_registry_has_no_secrets(params: Params, project: Path, capsys) -> None:
    version = promote(Round.of(params, project, "001"), AUTO)
    secret = params.tracking.model_copy(update={"uri": "http://me:p@ss@127.0.0.1:9"})
    with pytest.raises(UserError, match=r"^tracking\.uri: ") as error:
        versions(params.model_copy(update={"tracking": secret}), project)
    assert "ss@" not in str(error.value)
    assert not any("mlflow.db" in value or "tracking" in value for value in version.tags.values())


def test_lineage_of_a_version_marks_later_changes(params: Params, project: Path, capsys) -> None:
    promote(Round.of(params, project, "002"), AUTO)
    assert cli.run(["lineage", "002", "--json"]) == 0
    found = graph.Node.model_validate_json(capsys.readouterr().out)
    assert found.name == "srpo-tiny 1 @champion"
    states = {node.path: node.state for node in found.walk() if node.path}
    assert states.pop("data/base") == "missing" and set(states.values()) == {"ok"} and len(states) == 9
    names = [node.name for node in found.walk()][1:]
    one_round = ["adapter", "winners", "scores", "candidates", "prompts"]
    assert names == ["round 002", *one_round, "round 001", *one_round, "base model"]

    retrain(params, project, "001")
    shutil.rmtree(RoundFiles(project, "002").winners)
    found = provenance(params, project, "champion")
    graph.verify(project, found)
    states = {node.path: node.state for node in found.walk() if node.path}
    assert (states["rounds/001/adapter"], states["rounds/002/winners"]) == ("differs", "missing")
    assert states["rounds/002/adapter"] == states["rounds/001/winners"] == "ok"
    assert cli.run(["lineage", "v1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("adapter  differs  rounds/001/adapter" in line for line in lines)
    assert cli.run(["lineage", "7"]) == 2
    assert capsys.readouterr().err == "srpo: error: srpo-tiny: no version or alias '7'; there is 1\n"


def test_restore_gives_the_promoted_bytes(params: Params, project: Path, capsys) -> None:
    adapter = RoundFiles(project, "001").adapter
    keep_in_dvc(project, "001")
    version = promote(Round.of(params, project, "001"), AUTO)
    old, cache = dvc_digest(adapter), project / ".dvc" / "cache"
    retrain(params, project, "001")
    assert dvc_digest(adapter) != old
    assert cli.run(["restore", "1"]) == 0
    line = f"restored/1: version 1, round 001, adapter sha256 {version.tags['srpo.adapter']}"
    assert capsys.readouterr().out == f"{line}, verified\n"
    assert dvc_digest(project / "restored" / "1") == old
    assert cli.run(["restore", "champion"]) == 0 and capsys.readouterr().out == f"{line}, already restored\n"

    (project / "restored" / "1" / WEIGHTS_FILE).write_bytes(b"edited")
    assert cli.run(["restore", "1"]) == 2
    assert capsys.readouterr().err.startswith("srpo: error: restored/1: exists and is not version 1; remove it or")
    assert (project / "restored" / "1" / WEIGHTS_FILE).read_bytes() == b"edited"

    shutil.copytree(cache, project / "remote")
    shutil.rmtree(cache)
    assert cli.run(["restore", "1", "--to", "elsewhere"]) == 2
    error = capsys.readouterr().err
    assert "neither in DVC's cache nor on the default remote" in error and "Traceback" not in error
    assert not (project / "elsewhere").exists()
    dvc(project, "remote", "add", "-d", "store", str(project / "remote"))
    assert cli.run(["restore", "1", "--to", "elsewhere"]) == 0
    assert dvc_digest(project / "elsewhere") == old


def test_restore_refuses_other_bytes(params: Params, project: Path, capsys) -> None:
    keep_in_dvc(project, "001")
    promote(Round.of(params, project, "001"), AUTO)
    weights = next(p for p in (project / ".dvc" / "cache").rglob("*") if p.is_file() and p.read_bytes()[8:9] == b"{")
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert cli.run(["restore", "1"]) == 2
    assert "is not the adapter" in capsys.readouterr().err and not (project / "restored" / "1").exists()


def test_look_up_by_number_and_alias(params: Params, project: Path) -> None:
    with pytest.raises(UserError, match=r"srpo-tiny: no version or alias '1'; there is none; promote a round first"):
        look_up(params, project, "1")
    promote(Round.of(params, project, "001"), AUTO)
    assert {str(look_up(params, project, which).version) for which in ("1", "v1", "champion")} == {"1"}
