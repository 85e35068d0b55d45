"""Loading the base pipeline, VAEs, and the CUDA layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.lineage.record import read_lineage
from srpo.models.pipeline import TEXT_PARTS, load_pipeline, optimize_for_inference
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler, seeded
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from tests.support.world import sampling_params

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def with_model(params: Params, **values) -> Params:
    return params.model_copy(update={"model": params.model.model_copy(update=values)})


def test_loading_shows_no_progress_bars(params: Params, world: Path, capfd: pytest.CaptureFixture) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    from srpo.models.pipeline import load_pipeline
    from srpo.rewards.loading import load_reward

    load_pipeline(params.model, torch.float32)
    load_reward(params.rewards["judge"], world, torch.device("cpu"))
    assert capfd.readouterr().err == ""
    assert not are_progress_bars_disabled()


def test_inference_layout_changes_rounding_only(params: Params) -> None:
    plain, fast = Sampler(params), Sampler(params)
    optimize_for_inference(fast.pipeline)
    attention = fast.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert attention.fused_projections and fast.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    embeds, noise = plain.encode(PROMPTS), plain.noise(seeded([1, 2]), 32, 32)
    one, other = (sampler.denoise(noise, embeds[[0, 1]], embeds[[-1]], sampling_params()) for sampler in (plain, fast))
    assert torch.allclose(one, other, atol=1e-4)
    assert (plain.decode(one).int() - fast.decode(one).int()).abs().max() <= 1


def test_adapters_merge_before_projections_fuse(params: Params, world: Path) -> None:
    from srpo.stages.score import score
    from srpo.stages.select import select
    from srpo.stages.train import train

    for stage in (generate, score, select, train):
        stage(Round.of(params, world, "001"))
    adapter = RoundFiles(world, "001").adapter
    plain, fast = Sampler(params, adapter), Sampler(params, adapter)
    optimize_for_inference(fast.pipeline)
    embeds, noise = plain.encode(PROMPTS), plain.noise(seeded([1, 2]), 32, 32)
    merged, fused, base = (
        sampler.denoise(noise, embeds[[0, 1]], embeds[[-1]], sampling_params())
        for sampler in (plain, fast, Sampler(params))
    )
    assert torch.allclose(merged, fused, atol=1e-4)
    assert not torch.allclose(merged, base, atol=1e-4), "the adapter changes nothing"


def test_vae_loads_from_its_folder_or_a_pipeline(params: Params, world: Path) -> None:
    own = load_pipeline(params.model, torch.float32, **dict.fromkeys(TEXT_PARTS)).vae
    with torch.no_grad():
        own.decoder.conv_out.bias += 0.5
    own.save_pretrained(world / "data" / "vae")
    own.save_pretrained(world / "data" / "other" / "vae")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    base = Sampler(params).decode(latents)
    one, other = (Sampler(with_model(params, vae=f"data/{name}")).decode(latents) for name in ("vae", "other"))
    assert torch.equal(one, other) and not torch.equal(one, base)
    pin_base(Round.of(with_model(params, vae="data/vae"), world, "base"))
    assert read_lineage(RoundFiles(world, "base"))["vae"]["source"] == "data/vae"
    with pytest.raises(UserError, match=r"model\.vae: can't load 'data/judge' as a VAE"):
        Sampler(with_model(params, vae="data/judge")).decode(latents)


@pytest.mark.parametrize(("upcast", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_vae_is_upcast_only_if_needed(params: Params, world: Path, upcast: bool, dtype: torch.dtype) -> None:
    own = load_pipeline(params.model, torch.float32, **dict.fromkeys(TEXT_PARTS)).vae
    own.register_to_config(force_upcast=upcast)
    own.save_pretrained(world / "data" / "vae")
    half = with_model(params, vae="data/vae")
    half = half.model_copy(update={"runtime": half.runtime.model_copy(update={"dtype": "bfloat16"})})
    assert Sampler(half).vae.dtype == dtype
