"""Sampling agrees with diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.images import decode_images
from srpo.models.pipeline import load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from tests.support.world import sampling_params

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def test_sampling_equals_the_diffusers_pipeline(params: Params, world: Path) -> None:
    """The loop of our own must do what `StableDiffusionXLPipeline.__call__` does."""
    from srpo.sampling.sampler import Sampler

    sampler, pipeline = Sampler(params), load_pipeline(params.model, torch.float32)
    embeds, noise = sampler.encode(["a red circle", "a blue square"]), sampler.noise([1, 2], 32, 32)
    for guidance in (1.0, 4.0):
        ours = sampler.denoise(noise, embeds[[0, 1]], embeds[[-1]], sampling_params(5, guidance))
        theirs = pipeline(
            prompt=["a red circle", "a blue square"],
            latents=noise,
            num_inference_steps=5,
            guidance_scale=guidance,
            height=32,
            width=32,
            output_type="latent",
        ).images
        assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()


def test_images_are_the_decoded_latents(params: Params, world: Path) -> None:

    generate(Round.of(params, world, "001"))
    rows = list(parquet.read_rows(RoundFiles(world, "001").candidates))[:3]
    latents = torch.from_numpy(np.stack([parquet.latents_array(row) for row in rows]))
    decoded = Sampler(params).decode(latents).numpy()
    assert np.array_equal(decoded, decode_images(row["image"] for row in rows))
