"""`srpo check`: each thing that can be wrong is told in one line, and nothing heavy is loaded for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from srpo import cli
from srpo.config.loader import load_params
from srpo.evaluation import inception
from srpo.preflight import checks, services
from srpo.preflight.services import Finding
from srpo.rewards import aesthetic, hps, imagereward
from tests.support.world import write_prompts

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random-weight project as a Git and DVC repository with a remote beside it, all committed."""
    root = tmp_path_factory.mktemp("prepared") / "project"
    shutil.copytree(shared_world, root)
    run(root, "git", "init", "-q")
    run(root, sys.executable, "-m", "dvc", "init", "-q")
    (root / ".gitignore").write_text("/data\n")
    (root / "data.dvc").write_text("outs: []\n")
    with (root / ".dvc" / "config").open("a") as config:
        config.write("[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
    run(root, "git", "add", ".")
    run(root, "git", "-c", "user.name=Someone", "-c", "user.email=someone@example.org", "commit", "-qm", "All")
    return root


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, as the current directory."""
    root = shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.chdir(root)
    return root


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, check=True, cwd=folder)


def findings(root: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in checks.check_project(load_params(root / "params.yaml"), root)}


def edit(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new))


def test_a_sound_project_passes_and_is_left_as_it_was(project: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(path for path in project.parent.rglob("*") if ".dvc/tmp" not in str(path))
    assert cli.run(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[1]: line.split()[0] for line in lines}
    few = {"prompts.train", "prompts.eval"}
    assert {name for name, state in states.items() if state != "ok"} == few, lines
    assert "takes and gives up an object" in next(line for line in lines if "dvc remote" in line)
    store = project.parent / "store"
    after = sorted(path for path in project.parent.rglob("*") if ".dvc/tmp" not in str(path))
    assert [path for path in after if path not in before] == [store], "left something behind"


def test_no_weights_and_no_torch_are_loaded(project: Path) -> None:
    code = (
        "import sys; from srpo import cli; code = cli.run(['check']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project, env=None)


def test_what_is_wrong_with_prompts_is_told(project: Path) -> None:
    texts = ["a red circle", "A red  circle", "a very " + "very " * 20 + "red circle"]
    write_prompts(project / "data/prompts/train.jsonl", texts, "train")
    found = findings(project)["prompts.train"]
    assert found.state == "warn"
    assert "3 prompts; 1 texts stand there more than once" in found.text
    assert "1 longer than the 16 tokens CLIP reads (counted)" in found.text and "train-0002" in found.text
    write_prompts(project / "data/prompts/eval.jsonl", ["a RED circle"], "eval")
    assert findings(project)["prompts"].state == "fail"
    (project / "data/prompts/eval.jsonl").write_text("{}\n")
    assert findings(project)["prompts.eval"] == Finding(
        "prompts.eval", "fail", f"{project}/data/prompts/eval.jsonl:1: id is missing or not text"
    )


def test_tokens_are_estimated_where_no_tokenizer_is(project: Path) -> None:
    shutil.rmtree(project / "data/base/tokenizer")
    write_prompts(project / "data/prompts/train.jsonl", ["word " * 60, "word " * 80], "train")
    text = findings(project)["prompts.train"].text
    assert "1 longer than the 77 tokens CLIP reads (estimated" in text and "train-0001" in text


def test_what_is_missing_fails(project: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.rmtree(project / "data/reference")
    shutil.rmtree(project / "data/judge")
    (project / "data/base/unet/diffusion_pytorch_model.safetensors").unlink()
    found = findings(project)
    assert found["evaluate.reference"].state == "fail"
    assert found["rewards.judge.model"].state == "fail" and "no folder here" in found["rewards.judge.model"].text
    assert found["model.base"].text.startswith("data/base holds no unet/diffusion_pytorch_model.safetensors")
    assert cli.run(["check"]) == 2
    assert "3 of 15 checks failed" in capfd.readouterr().err


def test_a_hub_model_that_is_not_there_is_one_line(project: Path) -> None:
    edit(project, "kind: clip, model: data/judge", "kind: clip")
    found = findings(project)["rewards.judge.model"]
    assert found.state == "fail" and "HF_HUB_OFFLINE" in found.text and "\n" not in found.text


def test_a_remote_that_takes_nothing_fails(project: Path) -> None:
    (project.parent / "store").write_text("a file, no folder")
    found = findings(project)["dvc remote"]
    assert found.state == "fail" and "can't be written to" in found.text
    run(project, sys.executable, "-m", "dvc", "remote", "remove", "store")
    assert findings(project)["dvc remote"].state == "warn"


def test_work_that_is_not_committed_warns(project: Path) -> None:
    edit(project, "seed: 0", "seed: 1")
    assert findings(project)["git"] == Finding(
        "git", "warn", "1 files not committed; commit them, so that rounds name what made them"
    )
    (project / "data.dvc").unlink()
    assert "`dvc add data`" in findings(project)["dvc"].text
    shutil.rmtree(project / ".dvc")
    assert findings(project)["dvc"].state == "fail"


def test_a_bad_params_file_is_one_line(project: Path, capfd: pytest.CaptureFixture) -> None:
    edit(project, "seed: 0", "seed: no")
    assert cli.run(["check"]) == 2
    assert "seed: Input should be a valid integer" in capfd.readouterr().err


def test_an_sdxl_round_has_its_price(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = load_params(REPO / "presets" / "sdxl.yaml")
    monkeypatch.setattr(checks, "_devices", lambda: [("NVIDIA H100 80GB HBM3", 85.0)])
    memory, disk, base, *rounds = checks._costs(params, tmp_path, 4000, 1000)
    assert memory.state == "ok" and "85 GB" in memory.text and disk.what == "disk"
    assert base.what == "round base" and [item.what for item in rounds] == ["round 001", "round 002", "round 003"]
    assert "at 40% of the bf16 peak, assumed: NVIDIA H100 80GB HBM3 11.4 (generate 82%" in rounds[0].text
    monkeypatch.setattr(checks, "_devices", lambda: [("NVIDIA GeForce RTX 4090", 25.0)])
    assert checks._costs(params, tmp_path, 4000, 1000)[0].state == "warn"
    monkeypatch.setattr(checks, "_devices", list)
    assert "H200" in checks._costs(params, tmp_path, 4000, 1000)[3].text
    assert checks._costs(params, tmp_path, 10**7, 1000)[1].state == "fail"


@pytest.fixture
def answering() -> Iterator[tuple[str, dict]]:
    """A server on loopback, and what it answers with and was asked."""
    state: dict = {"status": 200, "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append((self.path, self.headers.get("Authorization")))
            self.send_response(state["status"])
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    server.server_close()


def test_servers_are_asked(answering: tuple[str, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address, state = answering
    assert services.find_mlflow(address).state == "ok"
    assert state["asked"][-1][0].startswith("/api/2.0/mlflow/experiments/search")
    state["status"] = 403
    assert "--allowed-hosts" in services.find_mlflow(address).text
    state["status"] = 200
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
    assert services.find_prefect().state == "ok" and state["asked"][-1][0] == "/api/flows/count"
    state["status"] = 401
    assert "PREFECT_API_AUTH_STRING" in services.find_prefect().text
    state["status"] = 200
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert "none configured" in services.find_prefect().text
    (tmp_path / "profiles.toml").write_text(
        f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{address}/other"\n', encoding="utf-8"
    )
    assert services.find_prefect().state == "ok" and state["asked"][-1][0] == "/other/flows/count"


def test_a_server_that_is_down_fails_without_its_password() -> None:
    found = services.find_mlflow("http://someone:hunter2@127.0.0.1:9")
    assert found.state == "fail" and "does not answer" in found.text and "hunter2" not in found.text


def test_what_families_load_is_what_is_looked_for() -> None:
    for kind, family in {"hpsv2": hps.HpsV2, "hpsv2.1": hps.HpsV21}.items():
        assert services.FILES[kind] == family.FILE
        assert services.COMPANIONS[kind][:2] == tuple(hps.TOKENIZER)
    assert services.COMPANIONS["imagereward"][:2] == tuple(imagereward.TOKENIZER)
    assert services.FILES["imagereward"] == imagereward.FILE
    assert services.COMPANIONS["aesthetic"][:2] == tuple(aesthetic.TOWER)
    assert services.FILES["aesthetic"] == aesthetic.FILE
    assert services.INCEPTION_FILE == inception.WEIGHTS_FILE


def test_the_presets_prompts_are_sound() -> None:
    for name in ("train", "eval"):
        lines = (REPO / "srpo" / "scaffold" / "project" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        assert all({"id", "prompt"} <= json.loads(line).keys() for line in lines)
