"""The tiny world: its images say what its captions say, and a minute-size run makes every part of it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.make import QUICK, make_world, split
from demo.scenes import COLORS, POSITIONS, SHAPES, all_scenes, miscaptioned, render
from tests.demo.made import assert_srpo_reads_the_models, assert_what_is_there_is_kept, make_quickly

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quickly(partial(make_world, effort=QUICK), tmp_path_factory.mktemp("quick") / "data")


def test_no_two_scenes_share_a_caption_or_an_image() -> None:
    scenes = all_scenes()
    assert len({scene.caption for scene in scenes}) == len({render(scene).tobytes() for scene in scenes}) == 360


def test_both_prompt_sets_hold_every_part_of_the_world() -> None:
    train, held_out = split(all_scenes())
    assert not set(train) & set(held_out)
    for scenes in (train, held_out):
        assert {scene.color for scene in scenes} == set(COLORS)
        assert {scene.shape for scene in scenes} == set(SHAPES)
        assert {scene.position for scene in scenes} == set(POSITIONS)


def test_wrong_captions_are_scattered() -> None:
    rng, scene = np.random.default_rng(0), all_scenes()[0]
    told = Counter(miscaptioned(scene, rng, 0.15).caption for _ in range(3000))
    # a replacement may be the right value by chance
    right = (1 - 0.15 * 5 / 6) * (1 - 0.15 * 3 / 4) * (1 - 0.15 * 4 / 5) * (1 - 0.15 * 2 / 3)
    assert abs(told.pop(scene.caption) / 3000 - right) < 0.03
    assert len(told) > 50 and max(told.values()) < 200


def test_the_exact_judge_reads_images_of_the_world(quick_world: Path) -> None:
    """Its errors are the noise of the accuracy that the campaign reports."""
    from srpo.rewards.templates import TemplateReward

    judge = TemplateReward(str(quick_world / "templates.parquet"), None, torch.device("cpu"))
    rng, scenes = np.random.default_rng(1), all_scenes()
    images = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
    noisy = (images + 20 * torch.randn(images.shape, generator=torch.manual_seed(0))).clamp(0, 255).byte()
    captions = [scene.caption for scene in scenes]
    assert judge.score(images, captions).mean() > 0.99
    assert judge.score(noisy, captions).mean() > 0.98
    assert judge.score(images, captions[1:] + captions[:1]).mean() < 0.01


def test_the_models_are_in_the_formats_that_srpo_reads(quick_world: Path) -> None:
    assert_srpo_reads_the_models(quick_world, parameters=(2e6, 4e6), most_bytes=10e6)


@pytest.mark.parametrize("made", ["now", "shipped"])
def test_plain_diffusers_samples_with_an_adapter(made: str, quick_world: Path, tmp_path: Path) -> None:
    """Without a dtype: all parts must load in the same one."""
    from diffusers import StableDiffusionXLPipeline

    from srpo.config.loader import load_params
    from srpo.training.model import LoraModel

    base = (quick_world if made == "now" else REPO / "data") / "base"
    settings = load_params(REPO / "params.yaml").train.model_copy(update={"rank": 2, "target_modules": ["to_q"]})
    trained = LoraModel(StableDiffusionXLPipeline.from_pretrained(base).unet, settings, seed=0)
    for name, value in trained.parameters.items():
        if "lora_B" in name:  # it starts as zeros
            torch.nn.init.ones_(value)
    trained.save(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)

    def sample() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        images = pipeline("a red circle", height=64, width=64, num_inference_steps=2, generator=generator).images
        return np.asarray(images[0])

    plain = sample()
    pipeline.load_lora_weights(tmp_path)
    assert not np.array_equal(sample(), plain), "the adapter changes nothing"


def test_what_is_there_is_kept(quick_world: Path) -> None:
    assert_what_is_there_is_kept(partial(make_world, effort=QUICK), quick_world)
