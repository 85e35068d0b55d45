"""Sampling on a GPU: near the CPU's in float32, near float32 in bfloat16, and whole when memory runs out."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params
from srpo.models.adapters import with_adapter
from srpo.models.pipeline import load_pipeline, optimize_for_inference
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler, sample_images
from srpo.stages.base import pin_base
from tests.gpu.helpers import DEVICE, PROMPTS, error, marks, on, sampled
from tests.models.test_merging import write_adapter
from tests.sampling.test_early_rejection import candidates, with_rules
from tests.support.world import random_vae, sampling_params

pytestmark = marks


def test_float32_agrees_with_the_cpu(params: Params) -> None:
    expected, images = sampled(Sampler(on(params, "cpu")))
    found, pixels = sampled(Sampler(on(params)))
    assert error(found, expected) < 1e-2
    assert (pixels.int() - images.int()).abs().float().mean() < 1


def test_bfloat16_agrees_with_float32(params: Params) -> None:
    expected, images = sampled(Sampler(on(params)))
    found, pixels = sampled(Sampler(on(params, dtype="bfloat16")))
    assert 0 < error(found, expected) < 0.05
    assert (pixels.int() - images.int()).abs().float().mean() < 3


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-2), ("bfloat16", 0.05)])
def test_optimizing_changes_rounding_only(params: Params, dtype: str, bound: float) -> None:
    plain, fast = Sampler(on(params, dtype=dtype)), Sampler(on(params, dtype=dtype), fast=True)
    attention = fast.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert attention.fused_projections, "nothing was optimized"
    assert error(sampled(fast)[0], sampled(plain)[0]) < bound


@pytest.mark.slow
def test_compiling_changes_rounding_and_compiles_once(params: Params) -> None:
    """After two batch sizes, a third one is no reason to compile again."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    expected, _ = sampled(Sampler(on(params)))
    compiled = Sampler(on(params, compile=True), fast=True)
    found, _ = sampled(compiled)
    assert error(found, expected) < 1e-2
    first = counters["stats"]["unique_graphs"]
    assert first > 0, "nothing was compiled"
    for count in (4, 3):
        sampled(compiled, count)
    several = counters["stats"]["unique_graphs"]
    assert several <= 2 * first
    for count in (5, 6, 4, 3):
        sampled(compiled, count)
    assert counters["stats"]["unique_graphs"] == several


def test_batches_are_halved_when_memory_runs_out(params: Params, caplog: pytest.LogCaptureFixture) -> None:
    """A real end of memory: the process may use what two images need, and half as much again."""
    sampler = Sampler(on(params))
    embeds = sampler.encode(PROMPTS)
    large = sampling_params(2, 4.0).model_copy(update={"height": 512, "width": 512})
    seeds = list(range(32))
    sampler.batch_size = 2
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected, _ = sample_images(sampler, embeds, [0] * 32, seeds, large)
    limit = 1.5 * torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    sampler.batch_size = 32
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(limit / total)
        found, images = sample_images(sampler, embeds, [0] * 32, seeds, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 32 images at once; going on with 16" in caplog.text
    assert sampler.batch_size < 16, "half of the images did not fit either"
    assert len(images) == 32
    assert error(found.float(), expected.float()) < 1e-2


def test_the_decoder_sees_a_few_images_at_once(params: Params) -> None:
    rows = 8
    sampler = Sampler(on(params, vae_batch_size=rows))
    sampler.vae = random_vae().to(DEVICE).eval()
    latents = torch.randn(4 * rows, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    sampler.decode(latents[:rows])
    peaks = []
    images = []
    for part in (latents[:rows], latents):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        images.append(sampler.decode(part))
        peaks.append(torch.cuda.max_memory_allocated())
    assert (images[1][:rows].int() - images[0].int()).abs().max() <= 1
    assert peaks[1] < 1.5 * peaks[0]


def test_early_rejection_chooses_as_on_the_cpu(params: Params, root: Path) -> None:
    """Previews score the same up to rounding, and as many candidates are stopped."""
    tables = []
    for device in ("cpu", DEVICE):
        rules = with_rules(on(params, device), reward="reward", checkpoints=[{"step": 1, "keep": 1}])
        pin_base(Round.of(rules, root, "base"))
        tables.append(candidates(rules, root))
    for expected, row in zip(*tables, strict=True):
        assert row["candidate_id"] == expected["candidate_id"]
        assert row["preview_scores"] == pytest.approx(expected["preview_scores"], abs=0.05)
    assert sorted(row["stopped_at"] for row in tables[1]) == [1] * 8 + [3] * 4
    assert sum(row["image"] is None for row in tables[1]) == 8


def test_a_small_lora_moves_bfloat16_predictions(
    params: Params, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept beside the weights, it stays after `optimize_for_inference`, and images follow it as in float32."""
    caplog.set_level(logging.INFO, "srpo")
    folder = RoundFiles(root, "001").adapter
    for file in folder.iterdir():
        file.unlink()
    write_adapter(params, folder, 0.002)
    found, _ = sampled(Sampler(on(params, dtype="bfloat16"), folder, fast=True))
    assert "kept beside the weights" in caplog.text
    exact, _ = sampled(Sampler(on(params), folder))
    assert 0 < error(found, exact) < 0.05


def test_a_merged_lora_is_fused_for_sampling(params: Params, root: Path) -> None:
    folder = RoundFiles(root, "001").adapter
    for file in folder.iterdir():
        file.unlink()
    write_adapter(params, folder, 0.5)
    pipeline = load_pipeline(params.model, torch.bfloat16).to(DEVICE)
    pipeline.unet = with_adapter(pipeline.unet, folder)
    optimize_for_inference(pipeline)
    assert pipeline.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.fused_projections
    base, _ = sampled(Sampler(on(params)))
    exact, _ = sampled(Sampler(on(params), folder))
    tuned, _ = sampled(Sampler(on(params, dtype="bfloat16"), folder, fast=True))
    assert error(tuned, exact) < error(base, exact) / 2


def test_offload_changes_nothing(params: Params) -> None:
    expected = sampled(Sampler(on(params)))
    sampler = Sampler(on(params, offload=True))
    assert sampler.unet.device.type == "cpu"
    found = sampled(sampler)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (sampler.unet.device.type, sampler.vae.device.type) == ("cpu", DEVICE), "the VAE was the last to compute"


def test_weights_in_8_bits_give_the_rounded_bases_images(params: Params) -> None:
    rounded = params.model_copy(update={"model": params.model.model_copy(update={"fp8": True})})
    plain = Sampler(on(rounded, dtype="bfloat16"))
    stored = Sampler(on(rounded, dtype="bfloat16", compile=True), fast=True)
    dtypes = {weight.dtype for weight in stored.unet.parameters()}
    assert dtypes == {torch.bfloat16, torch.float8_e4m3fn}
    assert stored.unet.dtype == torch.bfloat16
    assert error(sampled(stored)[0], sampled(plain)[0]) < 0.1, "layouts differ, so last digits do"
