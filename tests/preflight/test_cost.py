"""What a round costs: the formulas against torch's own count, and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from srpo.config.loader import Params, load_params
from srpo.preflight import cost as estimate

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdxl() -> Params:
    return load_params(REPO / "presets" / "sdxl.yaml")


def changed(params: Params, section: str, **values) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def test_the_unets_work_is_what_torch_counts() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        assert sum(weight.numel() for weight in unet.parameters()) == pytest.approx(estimate.UNET_WEIGHTS, rel=1e-3)
        for side, tolerance in ((1024, 1e-3), (512, 0.07)):  # attention grows faster than pixels
            extra = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            with FlopCounterMode(display=False) as counter:
                latents, text = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, 2048)
                unet(latents, torch.zeros(()), text, added_cond_kwargs=extra)
            counted = counter.get_total_flops() / 1e12
            assert estimate.unet_tflop(side, side) == pytest.approx(counted, rel=tolerance)


def test_a_winner_of_eight_costs_what_the_design_says(sdxl: Params) -> None:
    assert 8 * estimate.image_tflop(30, 3.0, 1024, 1024) == pytest.approx(3329, rel=1e-3)
    assert estimate.image_tflop(30, 1.0, 1024, 1024) < 0.53 * estimate.image_tflop(30, 1.5, 1024, 1024)
    cost = estimate.round_cost(sdxl, "001", 4000, 1000)
    assert cost.generate == pytest.approx(4000 * 3329, rel=1e-3)
    assert cost.train == pytest.approx(500 * 64 * 14)
    assert cost.evaluate == pytest.approx(1000 * 2 * 3 * 3329 / 8, rel=1e-3)
    for objective in ("dpo", "nft"):  # two winners' passes, and two by the reference without gradients
        dearer = estimate.round_cost(changed(sdxl, "train", objective=objective), "001", 4000, 1000)
        assert dearer.train == pytest.approx(500 * 64 * (2 * 14 + 2 * 6.76))
    assert cost.hours(989, 0.4) == pytest.approx((cost.generate + cost.train + cost.evaluate) / 989 / 0.4 / 3600)


def test_early_rejection_saves_what_the_preset_says(sdxl: Params) -> None:
    settings = sdxl.generate.model_validate(
        sdxl.generate.model_dump()
        | {"early_rejection": {"reward": "pick", "checkpoints": [{"step": 9, "keep": 3}], "audit_fraction": 0.1}}
    )
    # 8 candidates for 9 steps and 3 for the other 21, and a tenth of the prompts whole
    assert estimate.mean_steps(settings) == pytest.approx(0.1 * 30 + 0.9 * (8 * 9 + 3 * 21) / 8)
    assert 1 - estimate.mean_steps(settings) / 30 == pytest.approx(0.4, abs=0.02)


@given(prompts=st.integers(1, 100_000), more=st.integers(1, 1000), share=st.floats(0.1, 0.9), peak=st.floats(10, 5000))
def test_more_prompts_cost_more_and_faster_devices_less(prompts: int, more: int, share: float, peak: float) -> None:
    params = load_params(REPO / "presets" / "sdxl.yaml")
    cost, dearer = (estimate.round_cost(params, "001", count, 500) for count in (prompts, prompts + more))
    assert dearer.hours(peak, share) > cost.hours(peak, share) > cost.hours(2 * peak, share) > 0
    assert estimate.round_bytes(params, "001", prompts + more, 500) > estimate.round_bytes(params, "001", prompts, 500)


def test_memory_follows_what_sets_it(sdxl: Params) -> None:
    small, large = (estimate.sampling_gb(changed(sdxl, "runtime", batch_size=n)) for n in (1, 16))
    assert 8 < small < 14 and small < large  # the weights alone are 7 GB
    assert estimate.sampling_gb(changed(sdxl, "model", vae=None)) > estimate.sampling_gb(sdxl)
    spared = estimate.training_gb(changed(sdxl, "runtime", gradient_checkpointing=True), "001")
    assert spared < estimate.training_gb(sdxl, "001") < 80
    assert estimate.training_gb(changed(sdxl, "train", method="full"), "001") - spared > 35  # 16 bytes a weight


def test_shards_of_the_preset_have_the_size_that_dvc_likes(sdxl: Params) -> None:
    one = changed(sdxl, "select", top_fraction=1e-9)
    grown = estimate.round_bytes(one, "001", 29, 1) - estimate.round_bytes(one, "001", 1, 1)
    assert 250e6 < grown < 500e6 and sdxl.generate.prompts_per_shard == 28


def test_devices_are_known_by_name() -> None:
    assert estimate.peak_tflops("NVIDIA H100 80GB HBM3") == estimate.peak_tflops("NVIDIA H200") == 989
    assert estimate.peak_tflops("NVIDIA H100 PCIe") == 756
    assert estimate.peak_tflops("NVIDIA GeForce RTX 4090") == 165
    assert estimate.peak_tflops("Quadro P400") is None
    assert all(estimate.peak_tflops(name) for name in estimate.EXAMPLES)
