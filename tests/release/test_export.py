"""Exports of a random-weight project give the sampler's images when they are loaded back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from srpo import cli
from srpo.config.loader import Params, load_params
from srpo.config.schema import SamplingParams
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
from tests.support.world import SIZE

PROMPT, SEED, STEPS, GUIDANCE = "a red circle", 7, 3, 2.0


@pytest.fixture(scope="module")
def project(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained and evaluated round."""
    root = tmp_path_factory.mktemp("export") / "project"
    shutil.copytree(shared_world, root)
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
        assert cli.run(["export", "001", "--to", "out", "--merged"]) == 0
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
        *(WEIGHTS_FILE, "tiny-001_kohya.safetensors"),
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
