"""`srpo check`: one line per problem, without loading torch or weights."""

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
from srpo.config.loader import Params, load_params
from srpo.data.prompts import Prompt
from srpo.evaluation import inception
from srpo.preflight import CheckResult, capacity, checks, models, services
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
    """A private copy, as the current directory."""
    root = shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, check=True, cwd=folder)


def results(root: Path) -> dict[str, CheckResult]:
    return {result.name: result for result in checks.check_project(load_params(root / "params.yaml"), root)}


def edit(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new))


def test_valid_project_passes_and_is_unchanged(project: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(path for path in project.parent.rglob("*") if ".dvc/tmp" not in str(path))
    assert cli.run(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[1]: line.split()[0] for line in lines}
    few = {"prompts.train", "prompts.eval"}
    assert {name for name, state in states.items() if state != "ok"} == few, lines
    assert "is writable" in next(line for line in lines if "dvc remote" in line)
    store = project.parent / "store"
    after = sorted(path for path in project.parent.rglob("*") if ".dvc/tmp" not in str(path))
    assert [path for path in after if path not in before] == [store], "files were left behind"


def test_torch_is_not_imported(project: Path) -> None:
    code = (
        "import sys; from srpo import cli; code = cli.run(['check']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project, env=None)


def test_prompt_problems(project: Path) -> None:
    texts = ["a red circle", "A red  circle", "a very " + "very " * 20 + "red circle"]
    write_prompts(project / "data/prompts/train.jsonl", texts, "train")
    found = results(project)["prompts.train"]
    assert found.state == "warn"
    assert "3 prompts; 1 duplicate texts" in found.text
    assert "1 longer than the 16 tokens that CLIP reads" in found.text and "train-0002" in found.text
    write_prompts(project / "data/prompts/eval.jsonl", [texts[2] + " again"], "eval")
    assert results(project)["prompts"].state == "fail"
    assert "has the text of train prompt 'train-0002', equal in all tokens" in results(project)["prompts"].text
    edit(project, "model:\n", "model:\n  long_prompts: chunk\n")
    assert results(project)["prompts"].state == "ok"
    assert "1 longer than the 16 tokens that CLIP reads, encoded in chunks" in results(project)["prompts.train"].text
    write_prompts(project / "data/prompts/eval.jsonl", ["a RED circle"], "eval")
    assert results(project)["prompts"].state == "fail"
    (project / "data/prompts/eval.jsonl").write_text("{}\n")
    assert results(project)["prompts.eval"] == CheckResult(
        "prompts.eval", "fail", f"{project}/data/prompts/eval.jsonl:1: id is missing or not text"
    )


def test_tokens_need_the_tokenizer(project: Path) -> None:
    shutil.rmtree(project / "data/base/tokenizer")
    write_prompts(project / "data/prompts/train.jsonl", ["word " * 60, "word " * 80], "train")
    assert "length in tokens not checked" in results(project)["prompts.train"].text


def test_missing_files_fail(project: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.rmtree(project / "data/reference")
    shutil.rmtree(project / "data/judge")
    (project / "data/base/unet/diffusion_pytorch_model.safetensors").unlink()
    found = results(project)
    assert found["evaluate.reference"].state == "fail"
    assert (
        found["rewards.judge.model"].state == "fail" and "neither a local folder" in found["rewards.judge.model"].text
    )
    assert found["model.base"].text.startswith("data/base holds no unet/diffusion_pytorch_model.safetensors")
    assert cli.run(["check"]) == 2
    assert "3 of 15 checks failed" in capfd.readouterr().err


def test_uncached_hub_model_fails_offline(project: Path) -> None:
    edit(project, "kind: clip, model: data/judge", "kind: clip")
    found = results(project)["rewards.judge.model"]
    assert found.state == "fail" and "HF_HUB_OFFLINE" in found.text and "\n" not in found.text


def test_read_only_remote_fails(project: Path) -> None:
    (project.parent / "store").write_text("a file, no folder")
    found = results(project)["dvc remote"]
    assert found.state == "fail" and "not writable" in found.text
    run(project, sys.executable, "-m", "dvc", "remote", "remove", "store")
    assert results(project)["dvc remote"].state == "warn"


def test_uncommitted_files_warn(project: Path) -> None:
    edit(project, "seed: 0", "seed: 1")
    assert results(project)["git"] == CheckResult(
        "git", "warn", "1 uncommitted files; commit them, so that rounds record their code"
    )
    (project / "data.dvc").unlink()
    assert "`dvc add data`" in results(project)["dvc"].text
    shutil.rmtree(project / ".dvc")
    assert results(project)["dvc"].state == "fail"


def test_invalid_params_file(project: Path, capfd: pytest.CaptureFixture) -> None:
    edit(project, "seed: 0", "seed: no")
    assert cli.run(["check"]) == 2
    assert "seed: Input should be a valid integer" in capfd.readouterr().err


H100 = capacity.Device("NVIDIA H100 80GB HBM3", 85.0)


@pytest.fixture(scope="module")
def sdxl() -> Params:
    return load_params(REPO / "presets" / "sdxl.yaml")


def with_runtime(params: Params, **values) -> Params:
    return params.model_copy(update={"runtime": params.runtime.model_copy(update=values)})


def prompts(*counts: int) -> list[list[Prompt]]:
    return [[Prompt(f"p{number}", "a cat") for number in range(count)] for count in counts]


def test_sdxl_estimates(sdxl: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(capacity, "list_devices", lambda: [H100])
    memory, cards, disk, base, *rounds = capacity.check_capacity(sdxl, tmp_path, prompts(4000, 1000))
    assert memory.state == "ok" and "85 GB" in memory.text and disk.name == "disk"
    assert (
        cards.name == "memory by GPU"
        and "; 12 GB: batch_size 8, vae_batch_size 4, " in cards.text
        and cards.text.count("model.fp8 true") == 1
    )
    assert base.name == "round base" and [item.name for item in rounds] == ["round 001", "round 002", "round 003"]
    assert "in 1 process with" in rounds[0].text and "(NVIDIA H100 80GB HBM3: generate 9.3, score " in rounds[0].text
    assert capacity.check_capacity(sdxl, tmp_path, prompts(3 * 10**4, 1000))[2].state == "fail"
    assert capacity.check_capacity(sdxl, tmp_path, None)[-1].text.startswith("not estimated")
    monkeypatch.setattr(capacity, "list_devices", lambda: [capacity.Device("NVIDIA GeForce RTX 4090", 25.0)])
    assert capacity.check_capacity(sdxl, tmp_path, prompts(4000, 1000))[0].state == "warn"
    monkeypatch.setattr(capacity, "list_devices", list)
    assert "H200" in capacity.check_capacity(sdxl, tmp_path, prompts(4000, 1000))[4].text


def test_runtime_is_compared_with_the_machine(sdxl: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert capacity.check_runtime(sdxl, [H100]) == []
    (result,) = capacity.check_runtime(with_runtime(sdxl, processes=8), [H100])
    assert result.name == "runtime.processes" and "has 1 GPUs" in result.text
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f amx_bf16\n")
    monkeypatch.setattr("srpo.runtime.cpu.CPU_INFO", tmp_path / "cpuinfo")
    assert capacity.check_runtime(with_runtime(sdxl, device="auto", dtype="bfloat16"), []) == []
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f\n")
    for device, devices in (("auto", []), ("cpu", [H100])):
        (result,) = capacity.check_runtime(with_runtime(sdxl, device=device, dtype="bfloat16"), devices)
        assert result.name == "runtime.dtype" and "set float32" in result.text
    assert capacity.check_runtime(with_runtime(sdxl, device="cuda", dtype="bfloat16"), []) == []
    assert capacity.check_runtime(with_runtime(sdxl, device="cpu", dtype="auto"), []) == []


@pytest.fixture
def answering() -> Iterator[tuple[str, dict]]:
    """The address of a server, with the status it answers with and the requests it got."""
    state: dict = {"status": 200, "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append((self.path, self.headers.get("Authorization")))
            self.send_response(state["status"])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    server.server_close()


def test_mlflow_server_is_asked(answering: tuple[str, dict]) -> None:
    address, state = answering
    assert services.check_mlflow(address).state == "ok"
    assert state["asked"][-1][0].startswith("/api/2.0/mlflow/experiments/search")
    state["status"] = 403
    assert "--allowed-hosts" in services.check_mlflow(address).text


def test_unreachable_server_fails_without_password() -> None:
    found = services.check_mlflow("http://someone:hunter2@127.0.0.1:9")
    assert found.state == "fail" and "does not answer" in found.text and "hunter2" not in found.text


def test_inception_file() -> None:
    assert models.INCEPTION_FILE == inception.WEIGHTS_FILE


def test_example_prompts_are_valid() -> None:
    for name in ("train", "eval"):
        lines = (REPO / "srpo" / "scaffold" / "project" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        assert all({"id", "prompt"} <= json.loads(line).keys() for line in lines)
