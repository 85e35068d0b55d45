"""Checks of a made world: `make_quickly` makes it in a minute, the rest checks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def make_quickly(make: Callable[[Path], None], out: Path) -> Path:
    from diffusers import StableDiffusionXLPipeline

    sample = StableDiffusionXLPipeline.__call__
    with pytest.MonkeyPatch.context() as patch:  # the sheets of progress were half of the time
        patch.setattr(
            StableDiffusionXLPipeline,
            "__call__",
            lambda self, *args, **options: sample(self, *args, **options | {"num_inference_steps": 1}),
        )
        make(out)
    return out


def assert_srpo_reads_the_models(world: Path, *, parameters: tuple[float, float], most_bytes: float) -> None:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    from srpo.config.schema import RewardParams
    from srpo.rewards.loading import load_reward

    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "base")
    assert isinstance(pipeline.vae, AutoencoderKL) and pipeline.vae_scale_factor == 8
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    fewest, most = parameters
    assert fewest < sum(parameter.numel() for part in parts for parameter in part.parameters()) < most
    assert pipeline.unet.config.addition_embed_type == "text_time"
    scores = {}
    for name, role in (("reward", "select"), ("judge", "judge")):
        spec = RewardParams(kind="clip", model=str(world / name), role=role)
        clip = load_reward(spec, world, torch.device("cpu"))
        scores[name] = clip.score(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["a red circle", "a blue cross"])
    assert not torch.equal(scores["reward"], scores["judge"])
    shipped = [path for path in world.rglob("*") if path.is_file() and "work" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < most_bytes
    assert not [path.name for path in shipped if path.suffix in (".bin", ".pt", ".pkl")]


def assert_what_is_there_is_kept(make: Callable[[Path], None], world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*.safetensors")}
    make(world)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*.safetensors")} == before
