"""Sampling agrees with diffusers' own pipeline, and no image depends on the images beside it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline as Pipeline

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.decoding import decode_images
from srpo.models.pipeline import load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler, sample_images, seeded
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.storage.json_files import write_json
from tests.support.world import sampling_params

PROMPTS = ["a red circle", "a blue square"]
NEGATIVE = "a green circle"
SEEDS = [11, 12]
EDM: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
# every class that SDXL checkpoints ship with, with the options that they ship with where they matter
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler, v, zero terminal snr": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "euler, sample": ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "dpm++ 2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm++ sde": ("DPMSolverSDEScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm with prk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "edm euler": ("EDMEulerScheduler", EDM),
    "edm dpm++": ("EDMDPMSolverMultistepScheduler", EDM),
}


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


@pytest.fixture(scope="module")
def loaded(shared_world: Path) -> tuple[Sampler, Pipeline]:
    params = load_params(shared_world / "params.yaml")
    model = params.model.model_copy(update={"base": str(shared_world / "data" / "base")})
    return Sampler(params.model_copy(update={"model": model})), load_pipeline(model, torch.float32)


@pytest.fixture
def sampler(loaded: tuple[Sampler, Pipeline], monkeypatch: pytest.MonkeyPatch) -> Sampler:
    monkeypatch.setattr(loaded[0].pipeline, "scheduler", loaded[0].pipeline.scheduler)  # put back after the test
    monkeypatch.setattr(loaded[0], "batch_size", 16)
    return loaded[0]


@pytest.fixture
def pipeline(loaded: tuple[Sampler, Pipeline], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(loaded[1], "scheduler", copy.deepcopy(loaded[1].scheduler))
    return loaded[1]


def without_identity(root: Path) -> Path:
    """Return a project whose base has no identity, so that embeddings are not cached."""
    write_json(RoundFiles(root, "base").adapter / "lineage.json", {})
    return root


def make_scheduler(own: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    kind, options = SCHEDULERS[name]
    if kind == "DPMSolverSDEScheduler" and not importlib.util.find_spec("torchsde"):
        pytest.skip("needs torchsde")
    scheduler = getattr(diffusers, kind)
    return scheduler(**options) if kind.startswith("EDM") else scheduler.from_config(own.config, **options)


def by_diffusers(pipeline: Pipeline, **options: Any) -> torch.Tensor:
    """Return latents made one by one, as a user of diffusers makes them."""
    found = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        if hasattr(pipeline.scheduler, "noise_sampler_seed"):
            pipeline.scheduler.noise_sampler_seed = seed
        (generator,) = seeded([seed])
        call = {"num_inference_steps": 7, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent"}
        found.append(pipeline(prompt, generator=generator, **call | options).images)
    return torch.cat(found)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference of latents, ours in 16 bits, in units of their spread."""
    assert torch.isfinite(theirs).all()
    return ((ours.float() - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_equals_the_pipeline(sampler: Sampler, pipeline: Pipeline, name: str) -> None:
    sampler.pipeline.scheduler = make_scheduler(pipeline.scheduler, name)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, name)
    embeds = sampler.encode(PROMPTS)
    results = []
    for sampler.batch_size in (2, 16):  # 3 images of which 2 are compared, 2 at a time and all at once
        latents, _ = sample_images(sampler, embeds, [0, 1, 0], [*SEEDS, 13], sampling_params(7, 4.0))
        results.append(latents)
    assert torch.equal(*results)
    assert difference(results[0][:2], by_diffusers(pipeline)) < 2e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_equals_the_pipeline(
    sampler: Sampler, pipeline: Pipeline, tmp_path: Path, guidance: float, negative: str | None, rescale: float
) -> None:
    options = {"guidance_scale": guidance, "negative_prompt": negative, "guidance_rescale": rescale}
    embeds = prompt_embeds(sampler, PROMPTS, without_identity(tmp_path), [negative] * 2)
    latents, _ = sample_images(sampler, embeds, [0, 1], SEEDS, sampling_params(7, guidance, guidance_rescale=rescale))
    assert difference(latents, by_diffusers(pipeline, **options)) < 2e-3


def test_prompts_have_their_own_negative_prompts(sampler: Sampler, tmp_path: Path) -> None:
    mixed = prompt_embeds(sampler, [PROMPTS[0]] * 2, without_identity(tmp_path), [None, NEGATIVE])
    empty, negative = mixed.negative([0, 1]).tokens
    assert torch.equal(empty, sampler.encode([])[[-1]].tokens[0])
    assert torch.equal(negative, sampler.encode([NEGATIVE]).tokens[0])


def test_decoding_equals_the_pipeline(params: Params, world: Path) -> None:
    vae = load_pipeline(params.model, torch.float32).vae
    vae.register_to_config(latents_mean=[0.5, -0.5, 0.2, 0.1], latents_std=[2.0, 1.5, 2.0, 3.0])
    vae.save_pretrained(world / "data" / "vae")
    other = params.model_copy(update={"model": params.model.model_copy(update={"vae": "data/vae"})})
    sampler = Sampler(other)
    pipeline = load_pipeline(other.model, torch.float32)
    (theirs,) = pipeline(PROMPTS[0], generator=seeded([1])[0], num_inference_steps=2, height=32, width=32).images
    _, images = sample_images(sampler, sampler.encode(PROMPTS), [0], [1], sampling_params(2, 5.0))
    assert np.abs(images[0].numpy().astype(int) - np.asarray(theirs)).max() <= 2


def test_images_are_the_decoded_latents(params: Params, world: Path) -> None:
    generate(Round.of(params, world, "001"))
    rows = list(parquet.read_rows(RoundFiles(world, "001").candidates))[:3]
    latents = torch.from_numpy(np.stack([parquet.latents_array(row) for row in rows]))
    decoded = Sampler(params).decode(latents).numpy()
    assert np.array_equal(decoded, decode_images(row["image"] for row in rows))
