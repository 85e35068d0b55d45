"""Checkpoints of one file in Stability's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from srpo.config.loader import load_params
from srpo.errors import UserError
from srpo.models.original_layout import to_original_layout
from srpo.models.pipeline import load_pipeline
from srpo.models.single_file import load_single_file
from srpo.models.tokenizer import clip_tokenizer
from srpo.rounds import Round
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from tests.support.world import text_config

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def pipeline(world: Path) -> StableDiffusionXLPipeline:
    """The world's base with text encoders of two widths, by which diffusers tells them apart."""
    torch.manual_seed(1)
    pipeline = load_pipeline(load_params().model, torch.float32)
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(text_config(24, 16))
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, cross_attention_dim=16 + 24)
    pipeline.save_pretrained(world / "data" / "base")
    return pipeline


@pytest.fixture
def file(pipeline: StableDiffusionXLPipeline, world: Path) -> Path:
    """The world's base as one file."""
    path = world / "data" / "one.safetensors"
    save_file(to_original_layout(pipeline), path)
    return path


def test_all_tensors_come_back(pipeline: StableDiffusionXLPipeline, file: Path) -> None:
    loaded = load_single_file(file, torch.float32, Path("data/base"))
    for part in NETWORKS:
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.config.force_zeros_for_empty_prompt == pipeline.config.force_zeros_for_empty_prompt


def test_marker_keys_set_the_prediction_type(pipeline: StableDiffusionXLPipeline, file: Path) -> None:
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **options)
    save_file(to_original_layout(pipeline), file)
    config = load_single_file(file, torch.float32, Path("data/base")).scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"


def test_edm_comes_back_from_its_marker_keys(pipeline: StableDiffusionXLPipeline, file: Path) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    pipeline.scheduler = EDMDPMSolverMultistepScheduler()
    save_file(to_original_layout(pipeline), file)
    loaded = load_single_file(file, torch.float32, Path("data/base"))
    assert isinstance(loaded.scheduler, EDMDPMSolverMultistepScheduler)
    assert (loaded.scheduler.config.sigma_data, loaded.scheduler.config.prediction_type) == (0.5, "epsilon")
    assert loaded.vae.config.latents_mean == pytest.approx(mean)
    assert loaded.vae.config.latents_std == pytest.approx(std) and loaded.vae.config.scaling_factor == 0.5
    pipeline.scheduler = EDMEulerScheduler(prediction_type="v_prediction", sigma_max=120.0, sigma_data=1.0)
    save_file(to_original_layout(pipeline), file)
    config = load_single_file(file, torch.float32, Path("data/base")).scheduler.config
    assert (config.prediction_type, config.sigma_max, config.sigma_data) == ("v_prediction", 120.0, 1.0)


def test_clip_tokenizer_has_the_published_ids() -> None:
    tokenizer = clip_tokenizer("!")
    # as openai/clip-vit-large-patch14 encodes it
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407, *[0] * 74]
    assert clip_tokenizer("<|endoftext|>")("", padding="max_length").input_ids == [49406, *[49407] * 76]
    assert len(tokenizer("cat " * 200, truncation=True).input_ids) == 77
    assert len(tokenizer) == 49408


def test_generate_from_one_file(file: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo.models import single_file

    generate(Round.of(pinned(world), world, "001"))
    expected = candidates(world)
    (world / "params.yaml").write_text((world / "params.yaml").read_text().replace("base: data/base", f"base: {file}"))
    monkeypatch.setattr(load_single_file, "__defaults__", (world / "data" / "base",))  # of the small size
    words = pipeline_tokenizer(world)
    monkeypatch.setattr(single_file, "clip_tokenizer", lambda pad_token: words)
    generate(Round.of(pinned(world), world, "001"))
    assert candidates(world) == expected


def pinned(world: Path):
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def pipeline_tokenizer(world: Path):
    return CLIPTokenizer.from_pretrained(world / "data" / "base" / "tokenizer")


def candidates(world: Path) -> list[dict]:
    from srpo.data import parquet
    from srpo.rounds import RoundFiles

    return list(parquet.read_rows(RoundFiles(world, "001").candidates))


def test_parts_alone_are_refused(world: Path) -> None:
    params = load_params()
    unet = load_file(world / "data" / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(unet, world / "unet.safetensors")
    with pytest.raises(UserError, match=r"model\.base: unet.safetensors holds a UNet alone"):
        load_pipeline(params.model.model_copy(update={"base": "unet.safetensors"}), torch.float32)
