"""Exports of a random-weight project give the sampler's images when they are loaded back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from srpo import cli
from srpo.config.loader import Params, load_params
from srpo.config.schema import SamplingParams
from srpo.lineage.checkpoint_files import scheduler_options
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, read_lineage
from srpo.release.export import export
from srpo.release.registry import Decision, promote
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler, sample_images
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.gate import gate
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from srpo.storage.hashing import file_digest
from srpo.storage.json_files import write_json
from tests.release.test_registry import load_model
from tests.support.campaign import write_dvc_lock
from tests.support.hub import FakeHub
from tests.support.world import SIZE, text_config

PROMPT, SEED, STEPS, GUIDANCE = "a red circle", 7, 3, 2.0


@pytest.fixture(scope="module")
def project(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained and evaluated round."""
    root = tmp_path_factory.mktemp("export") / "project"
    shutil.copytree(shared_world, root)
    widen_second_text_encoder(root / "data" / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pin_base(Round.of(load_params(), root, "base"))
        for stage in (generate, score, select, train):
            stage(Round.of(load_params(), root, "001"))
        for key in ("base", "001"):
            evaluate(Round.of(load_params(), root, key))
        gate(Round.of(load_params(), root, "001"))
        # three steps hardly move a LoRA: make it one that can be seen
        adapter = RoundFiles(root, "001").adapter
        torch.manual_seed(0)
        state = {name: torch.randn_like(value) for name, value in load_file(adapter / WEIGHTS_FILE).items()}
        StableDiffusionXLPipeline.save_lora_weights(
            adapter, unet_lora_layers={name.removeprefix("unet."): value for name, value in state.items()}
        )
        lineage = json.loads((adapter / "lineage.json").read_text())
        lineage["adapter"] = file_digest(adapter / WEIGHTS_FILE)
        (adapter / "lineage.json").write_text(json.dumps(lineage))
        write_dvc_lock(load_params(), root, ("001",))
    return root


def widen_second_text_encoder(base: Path) -> None:
    """Give the base text encoders of two widths, by which readers of one-file checkpoints tell them apart."""
    torch.manual_seed(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(text_config(24, 16))
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, cross_attention_dim=16 + 24)
    pipeline.save_pretrained(base)


@pytest.fixture(autouse=True)
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


@pytest.fixture(scope="module")
def params(project: Path) -> Params:
    return load_params(project / "params.yaml")


@pytest.fixture(scope="module")
def exported(params: Params, project: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert cli.run(["export", "001", "--to", "out", "--merged", "--single-file"]) == 0
    return project / "out"


def sample(sampler: Sampler) -> np.ndarray:
    sampling = SamplingParams(num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE, width=SIZE)
    return sample_images(sampler, sampler.encode([PROMPT]), [0], [SEED], sampling)[1].numpy()[0].astype(int)


def sample_by(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    """By diffusers alone, from the same noise."""
    image = pipeline(
        PROMPT,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    return np.asarray(image).astype(int)


def base(project: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(project / "data" / "base")


@pytest.fixture(scope="module")
def expected(params: Params, project: Path) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        tuned = sample(Sampler(params, RoundFiles(project, "001").adapter))
        untouched = sample(Sampler(params))
    assert np.abs(tuned - untouched).max() > 10, "the adapter does nothing, so these tests could not fail"
    return tuned


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_loaded_lora_gives_the_same_image(exported: Path, project: Path, expected, kind: str) -> None:
    name = WEIGHTS_FILE if kind == "diffusers" else "tiny-001_kohya.safetensors"
    pipeline = base(project)
    pipeline.load_lora_weights(exported, weight_name=name)
    # the sampler adds the LoRA into the weights and samples 32 at once: other orders of summation
    assert np.abs(sample_by(pipeline) - expected).max() <= 1


def test_merged_pipeline_gives_the_same_image(exported: Path, expected) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(exported / "merged")
    assert np.abs(sample_by(pipeline) - expected).max() <= 1


def test_merged_pipeline_equals_the_sampler_exactly(exported: Path, params: Params, expected) -> None:
    merged = params.model_copy(update={"model": params.model.model_copy(update={"base": str(exported / "merged")})})
    assert (sample(Sampler(merged)) == expected).all()


def load_one_file(file: Path, base: Path) -> StableDiffusionXLPipeline:
    """Load by diffusers alone; the configuration says what a program finds out from sizes and marker keys."""
    with safe_open(file, "pt") as opened:
        options = scheduler_options(dict.fromkeys(opened.keys()))
    pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(base), local_files_only=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **options)
    return pipeline


def test_single_file_gives_the_same_image(exported: Path, project: Path, expected) -> None:
    file = exported / "tiny-001.safetensors"
    assert np.abs(sample_by(load_one_file(file, project / "data" / "base")) - expected).max() <= 1
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "epsilon"
        assert not {"v_pred", "ztsnr"} & set(opened.keys())


def test_single_file_of_v_prediction_is_marked(project: Path, tmp_path: Path, monkeypatch) -> None:
    """The marker keys alone give the images of a base with v-prediction and zero terminal SNR."""
    root = tmp_path / "project"
    shutil.copytree(project, root, ignore=shutil.ignore_patterns("out", "mlflow.db", "mlartifacts"))
    monkeypatch.chdir(root)
    config = root / "data" / "base" / "scheduler" / "scheduler_config.json"
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(json.loads(config.read_text()) | v))
    tuned = sample(Sampler(load_params(), RoundFiles(root, "001").adapter))
    assert cli.run(["export", "001", "--to", "out", "--single-file"]) == 0
    file = root / "out" / "tiny-001.safetensors"
    assert np.abs(sample_by(load_one_file(file, project / "data" / "base")) - tuned).max() <= 1
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"
        assert {"v_pred", "ztsnr"} <= set(opened.keys())


def test_lost_share_of_a_gentle_lora_is_said(project: Path, params: Params, capfd) -> None:
    adapter = RoundFiles(project, "001").adapter / WEIGHTS_FILE
    own = adapter.read_bytes()
    lineage = adapter.parent / "lineage.json"
    record = lineage.read_bytes()
    try:
        gentle = {name: value * 0.01 for name, value in load_file(adapter).items()}
        save_file(gentle, adapter)
        write_json(lineage, json.loads(record) | {"adapter": file_digest(adapter)})
        for dtype in ("bfloat16", "float32"):
            assert cli.run(["export", "001", "--to", f"gentle-{dtype}", "--merged", "--dtype", dtype]) == 0
            unet = project / f"gentle-{dtype}" / "merged" / "unet" / "diffusion_pytorch_model.safetensors"
            assert {str(value.dtype) for value in load_file(unet).values()} == {f"torch.{dtype}"}
    finally:
        adapter.write_bytes(own)
        lineage.write_bytes(record)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "survives" in line]
    assert "merged into bfloat16 weights" in line and line.endswith("--dtype float32 keeps all of it")


TOKEN = "hf_" + "s" * 34


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub(TOKEN, owner="someone") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_push_uploads_every_file(hub: FakeHub, project: Path, capfd) -> None:
    command = ["export", "001", "--to", "pushed", "--push-to-hub", "someone/tuned", "--private"]
    assert cli.run(command) == 0
    folder = project / "pushed"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == files and WEIGHTS_FILE in files
    assert (hub.visibility, hub.commits) == ("private", ["Upload pushed"])
    out, err = capfd.readouterr()
    assert f"{hub.url}/someone/tuned" in out
    assert TOKEN not in out + err and "HTTP Request" not in err


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [
        ("hf_" + "w" * 34, "someone/tuned", "no valid token; run `hf auth login`"),
        (TOKEN, "another/tuned", "the token may not write there"),
    ],
)
def test_refused_push_keeps_the_export(
    hub: FakeHub, project: Path, tmp_path: Path, capfd, monkeypatch, token: str, repository: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    to = tmp_path / "refused"
    assert cli.run(["export", "001", "--to", str(to), "--push-to-hub", repository]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert said in error and f"`hf upload {repository} {to}`" in error and token not in error
    assert (to / "README.md").exists() and not hub.files


def test_push_needs_a_repository_name(project: Path, capsys) -> None:
    assert cli.run(["export", "001", "--to", "nowhere", "--push-to-hub", "tuned"]) == 2
    assert "name it as owner/name" in capsys.readouterr().err and not (project / "nowhere").exists()


def test_registered_model_gives_the_same_image(params: Params, project: Path, expected) -> None:
    version = promote(Round.of(params, project, "001"), Decision("auto", "test", override="random weights"))
    pipeline = load_model(project, f"models:/{version.name}@champion").load_pipeline(device="cpu")
    assert np.abs(sample_by(pipeline) - expected).max() <= 1


def test_kohya_names_and_values(exported: Path, project: Path) -> None:
    state = load_file(exported / "tiny-001_kohya.safetensors")
    own = load_file(RoundFiles(project, "001").adapter / WEIGHTS_FILE)
    assert len(state) == len(own) // 2 * 3
    forms = {re.sub(r"^lora_unet_\w+\.", "", name) for name in state}
    assert forms == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {float(value) for name, value in state.items() if name.endswith("alpha")} == {2.0}
    place = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    name = f"lora_unet_{place.replace('.', '_')}.lora_down.weight"
    assert torch.equal(state[name], own[f"unet.{place}.lora.down.weight"])


def test_export_folder_is_a_hub_repository(exported: Path, project: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("README.md", "provenance.json", "lineage.json", "merged", "images"),
        *(WEIGHTS_FILE, "tiny-001_kohya.safetensors", "tiny-001.safetensors"),
    }
    card = ModelCard.load(exported / "README.md")
    for item in card.data.to_dict()["widget"]:
        assert (exported / item["output"]["url"]).stat().st_size > 0
    own = RoundFiles(project, "001").adapter / WEIGHTS_FILE
    assert file_digest(exported / WEIGHTS_FILE) == file_digest(own)
    assert not list(project.glob(".out*"))


def test_errors_are_one_line(exported: Path, project: Path, capsys) -> None:
    assert cli.run(["export", "001", "--to", "out"]) == 2
    assert capsys.readouterr().err == "srpo: error: --to: out is not empty; name a new folder\n"
    assert cli.run(["export", "002", "--to", "other"]) == 2
    assert "rounds/002/adapter: no weights" in capsys.readouterr().err and not (project / "other").exists()


def test_full_unet_round_exports_a_pipeline(
    params: Params, project: Path, tmp_path: Path, capsys, exported: Path, expected, monkeypatch
) -> None:
    root = tmp_path / "project"
    shutil.copytree(project, root, ignore=shutil.ignore_patterns("out", "mlflow.db", "mlartifacts"))
    monkeypatch.chdir(root)
    adapter = RoundFiles(root, "001").adapter
    (adapter / WEIGHTS_FILE).unlink()
    for name in (UNET_FILE, "config.json"):
        shutil.copy(exported / "merged" / "unet" / name, adapter)
    lineage = read_lineage(RoundFiles(root, "001")) | {"adapter": file_digest(adapter / UNET_FILE)}
    write_json(adapter / "lineage.json", lineage)
    with pytest.raises(cli.UserError, match=r"round 001: train\.method is full, so there is no LoRA.*--merged"):
        export(Round.of(params, root, "001"), root / "out")
    assert "merged" in export(Round.of(params, root, "001"), root / "out", merged=True)
    assert np.abs(sample_by(StableDiffusionXLPipeline.from_pretrained(root / "out" / "merged")) - expected).max() <= 1


def test_unreachable_hub_is_one_line(hub: FakeHub, project: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.run(["export", "001", "--to", str(tmp_path / "alone"), "--push-to-hub", "someone/tuned"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("srpo: error: --push-to-hub someone/tuned: ConnectError: ") and "complete" in error
