"""The keys for few-step bases in docs/how-to/bases.md give what diffusers' own pipeline gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from ruamel.yaml import YAML

from srpo.config.loader import load_params
from srpo.config.schema import ModelParams
from srpo.models.pipeline import load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler, sample_images, seeded
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from tests.support.world import SIZE, sampling_params

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "how-to" / "bases.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Few-step bases") : PAGE.index("## Guidance")]
BLOCKS: list[dict[str, Any]] = [
    YAML(typ="safe").load(text) for text in re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
]
NAMES = [f"{block['model']['scheduler']}-{block['generate']['num_inference_steps']}" for block in BLOCKS]


def test_the_page_has_every_kind() -> None:
    schedulers = {block["model"]["scheduler"] for block in BLOCKS}
    assert schedulers == {
        *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "TCDScheduler", "LCMScheduler")
    }


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_documented_keys_are_params(block: dict[str, Any], tmp_path: Path) -> None:
    """They are valid in the preset's params.yaml."""
    params = YAML(typ="safe").load(REPO / "presets" / "sdxl.yaml")
    for section, values in block.items():
        params[section] |= values
    (tmp_path / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    loaded = load_params(tmp_path / "params.yaml")
    assert loaded.generate.guidance_scale == 1 and loaded.evaluate.guidance_scales == [1.0]


@pytest.fixture(scope="module")
def pipeline(shared_world: Path) -> StableDiffusionXLPipeline:
    return load_pipeline(ModelParams(base=str(shared_world / "data" / "base")), torch.float32)


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_few_steps_equal_the_pipeline(
    shared_world: Path, pipeline: StableDiffusionXLPipeline, block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(shared_world / "params.yaml")
    base = str(shared_world / "data" / "base")
    own = params.model_copy(update={"model": ModelParams(base=base, **block["model"])})
    sampler = Sampler(own)
    own_config = pipeline.scheduler.config
    kind = getattr(diffusers, block["model"]["scheduler"])
    embeds = sampler.encode(["a red circle"])
    for steps in (1, 2, 4, 8):
        scheduler = kind.from_config(own_config, **block["model"].get("scheduler_config", {}))
        monkeypatch.setattr(pipeline, "scheduler", scheduler)
        latents, _ = sample_images(sampler, embeds, [0, 0], [5, 6], sampling_params(steps, 1.0))
        size = {"height": SIZE, "width": SIZE, "output_type": "latent"}
        (generator,) = seeded([6])
        theirs = pipeline(
            "a red circle", generator=generator, num_inference_steps=steps, guidance_scale=1.0, **size
        ).images
        assert ((latents[1:].float() - theirs).abs().max() / theirs.std()).item() < 2e-3, steps


def test_a_round_of_one_step(world: Path) -> None:
    """One unguided step, and training on what it makes."""
    text = (world / "params.yaml").read_text()
    text = text.replace("model:\n", "model:\n  scheduler_config: {timestep_spacing: trailing}\n", 1)
    text = re.sub(r"num_inference_steps: 3", "num_inference_steps: 1", text)
    text = re.sub(r"(?m)^(  guidance_scale: )[\d.]+", r"\g<1>1.0", text)
    (world / "params.yaml").write_text(text)
    params = load_params()
    assert (params.generate.num_inference_steps, params.generate.guidance_scale) == (1, 1.0)
    pin_base(Round.of(params, world, "base"))
    for stage in (generate, score, select, train):
        stage(Round.of(params, world, "001"))
    assert (RoundFiles(world, "001").adapter / "pytorch_lora_weights.safetensors").exists()
