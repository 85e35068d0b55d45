"""The estimates against torch's own count, and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from srpo.config.loader import Params, load_params
from srpo.config.schema import ImageSize
from srpo.data.prompts import Prompt
from srpo.preflight import cost, memory
from srpo.preflight.cost import PIXELS, Images

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdxl() -> Params:
    return load_params(REPO / "presets" / "sdxl.yaml")


def changed(params: Params, section: str, **values) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def test_unet_flop_match_torch() -> None:
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
        assert sum(weight.numel() for weight in unet.parameters()) == pytest.approx(cost.UNET_WEIGHTS, rel=1e-3)
        for side, tolerance in ((1024, 1e-3), (512, 0.07)):  # attention grows faster than pixels
            extra = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            with FlopCounterMode(display=False) as counter:
                latents, text = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, 2048)
                unet(latents, torch.zeros(()), text, added_cond_kwargs=extra)
            counted = counter.get_total_flops() / 1e12
            assert cost.unet_tflop(side * side) == pytest.approx(counted, rel=tolerance)


def test_round_of_sdxl(sdxl: Params) -> None:
    assert 8 * cost.image_tflop(30, 3.0, PIXELS) == pytest.approx(3329, rel=1e-3)
    assert cost.image_tflop(30, 1.0, PIXELS) < 0.53 * cost.image_tflop(30, 1.5, PIXELS)
    work = cost.round_cost(sdxl, Images(4000), Images(1000))
    assert work.generate.tflop == pytest.approx(4000 * 3329, rel=1e-3)
    assert work.train.tflop == pytest.approx(500 * 64 * 14)
    assert work.evaluate.tflop == pytest.approx(1000 * 2 * 3 * 3329 / 8, rel=5e-3)
    for objective in ("dpo", "nft"):  # both images with gradients, and both through the reference without
        pairs = cost.round_cost(changed(sdxl, "train", objective=objective), Images(4000), Images(1000))
        assert pairs.train.tflop == pytest.approx(500 * 64 * (2 * 14 + 2 * 6.76))


def test_hours_on_the_machine(sdxl: Params) -> None:
    work = cost.round_cost(sdxl, Images(4000), Images(1000))
    one = cost.Machine(peak=989, cores=16)
    hours = work.stage_hours(one)
    assert list(hours) == ["generate", "score", "train", "evaluate", "save"]
    assert hours["generate"] == pytest.approx(work.generate.tflop / 989 / 0.4 / 3600)
    assert hours["score"] == pytest.approx(work.score.tflop / 989 / 0.4 / 3600), "16 cores decode faster than that"
    assert work.gpu_hours(one) < sum(hours.values()) < 1.1 * work.gpu_hours(one)
    eight = work.stage_hours(cost.Machine(peak=989, processes=8, cores=16))
    assert eight["train"] == pytest.approx(hours["train"] / 8) and eight["evaluate"] == hours["evaluate"] / 8
    few_cores = work.stage_hours(cost.Machine(peak=989, processes=8, cores=1))
    assert few_cores["generate"] == pytest.approx(max(hours["generate"] / 8, 32_000 * cost.ENCODE_SECONDS / 3600))
    assert few_cores["score"] == pytest.approx(32_000 * cost.DECODE_SECONDS / 3600), "one core decodes slower"
    copied = cost.round_cost(sdxl, Images(4000), Images(1000), copies=2)
    assert copied.save_seconds == pytest.approx(1.5 * work.save_seconds)


def test_early_rejection_saves_four_tenths(sdxl: Params) -> None:
    settings = sdxl.generate.model_validate(
        sdxl.generate.model_dump()
        | {"early_rejection": {"reward": "pick", "checkpoints": [{"step": 9, "keep": 3}], "audit_fraction": 0.1}}
    )
    # 8 candidates for 9 steps and 3 for the other 21, and a tenth of the prompts whole
    assert cost.mean_steps(settings) == pytest.approx(0.1 * 30 + 0.9 * (8 * 9 + 3 * 21) / 8)
    assert 1 - cost.mean_steps(settings) / 30 == pytest.approx(0.4, abs=0.02)


@given(prompts=st.integers(1, 100_000), more=st.integers(1, 1000), share=st.floats(0.1, 0.9), peak=st.floats(10, 5000))
def test_more_prompts_cost_more(sdxl: Params, prompts: int, more: int, share: float, peak: float) -> None:
    machine = cost.Machine(peak, cores=8, share=share)
    faster = cost.Machine(2 * peak, cores=8, share=share)
    work, larger = (cost.round_cost(sdxl, Images(count), Images(500)) for count in (prompts, prompts + more))
    assert sum(larger.stage_hours(machine).values()) > sum(work.stage_hours(machine).values())
    assert work.gpu_hours(machine) == pytest.approx(2 * work.gpu_hours(faster))
    fewer, many = (cost.round_bytes(sdxl, Images(count), Images(500)) for count in (prompts, prompts + more))
    assert many > fewer


def test_weights_match_the_networks() -> None:
    """SDXL's own, on the meta device: those in 8 bits, the text encoders', and a LoRA's on them."""
    from bench.random_sdxl import SDXL, build_networks
    from srpo.models import fp8
    from srpo.training.model import LoraModel, TextEncoders

    with torch.device("meta"):
        networks = build_networks(SDXL, "meta", only=("unet", "text_encoder", "text_encoder_2"))
    unet, encoders = networks.pop("unet"), TextEncoders(**networks)
    in_8_bits = sum(weight.numel() for layer in fp8.layers(unet) for weight in layer.parameters())
    assert in_8_bits == pytest.approx(memory.FP8_WEIGHTS, rel=1e-3)
    assert sum(weight.numel() for part in encoders for weight in part.parameters()) == pytest.approx(
        memory.TEXT_WEIGHTS, rel=1e-3
    )
    settings = load_params(REPO / "presets" / "sdxl.yaml").train.model_copy(update={"train_text_encoder": True})
    with torch.device("meta"):
        model = LoraModel(unet, settings, 0, encoders)
    trained = sum(weight.numel() for weight in model.parameters.values())
    assert trained == pytest.approx(cost.lora_weights(settings), rel=1e-3)


def test_memory(sdxl: Params) -> None:
    small, large = (memory.sampling_gb(changed(sdxl, "runtime", batch_size=n)) for n in (1, 16))
    assert 8 < small < 16 and small < large  # the weights alone are 7 GB, and rewards 5
    assert memory.sampling_gb(changed(sdxl, "model", vae=None)) > memory.sampling_gb(sdxl)
    spared = memory.training_gb(changed(sdxl, "runtime", gradient_checkpointing=True))
    assert spared < memory.training_gb(sdxl) < 80
    assert memory.training_gb(changed(sdxl, "train", method="full")) - spared > 35  # 16 bytes a weight


def test_keys_that_spare_memory(sdxl: Params) -> None:
    """By offload rewards leave, and fp8 takes 2.2 GB from the UNet, in training only if weights aren't kept twice."""
    one = changed(sdxl, "runtime", batch_size=1)
    rewards = 2 * (2 * 0.99 + 0.43)
    assert memory.sampling_gb(one) - memory.sampling_gb(changed(one, "runtime", offload=True)) > rewards
    sliced = changed(sdxl, "runtime", vae_batch_size=1)
    assert memory.sampling_gb(sdxl) - memory.sampling_gb(sliced) == pytest.approx(
        8 * (memory.DECODE_GB - 2 * memory.DENOISE_GB)
    )
    fp8 = changed(one, "model", fp8=True)
    assert memory.sampling_gb(one) - memory.sampling_gb(fp8) == pytest.approx(2.209)
    assert memory.training_gb(fp8) > memory.training_gb(one)
    one, fp8 = (changed(params, "runtime", gradient_checkpointing=True) for params in (one, fp8))
    assert memory.training_gb(one) - memory.training_gb(fp8) == pytest.approx(2.209)
    text = changed(one, "train", train_text_encoder=True)
    assert memory.training_gb(text) - memory.training_gb(one) == pytest.approx(1.636 + 32 * 0.3953e-3 * 16)


def test_memory_on_a_cpu(sdxl: Params) -> None:
    """A process that trained a LoRA took 14.0 GB in its steps; see docs/performance.md."""
    small = changed(sdxl, "generate", height=256, width=256)
    small = changed(small, "runtime", device="cpu", dtype="auto", train_batch_size=1)
    assert memory.training_gb(small) == pytest.approx(14.0, rel=0.2)
    assert memory.training_gb(changed(small, "train", train_text_encoder=True)) > memory.training_gb(small) + 3
    assert memory.sampling_gb(small) == memory.sampling_gb(changed(small, "runtime", batch_size=1)), "one row at a time"


def test_keys_that_make_a_round_fit(sdxl: Params) -> None:
    """README's table is what `srpo check` computes, and each row fits where the next larger one does not."""
    table = (Path(__file__).parents[2] / "README.md").read_text()
    for size in memory.CARDS:
        keys = memory.fitting_keys(sdxl, size)
        assert keys, size
        assert f"| {size} GB | {' | '.join(str(value).lower() for value in keys.values())} |" in table
        fitting = memory.with_keys(sdxl, keys)
        assert max(memory.sampling_gb(fitting), memory.training_gb(fitting)) <= size
        for name in ("batch_size", "vae_batch_size", "train_batch_size"):
            larger = changed(fitting, "runtime", **{name: 2 * int(keys[name])})
            unchanged = keys[name] in (getattr(sdxl.runtime, name), fitting.runtime.batch_size)
            assert unchanged or max(memory.sampling_gb(larger), memory.training_gb(larger)) > size
    assert not memory.fitting_keys(changed(sdxl, "train", use_dora=True), 8), "a DoRA can't be trained in 8 bits"
    full, quantized = (changed(sdxl, "train", method="full", optimizer=name) for name in ("adamw", "adamw_8bit"))
    assert memory.fitting_keys(full, 80) and not memory.fitting_keys(full, 48) and memory.fitting_keys(quantized, 48)


def test_sizes_count(sdxl: Params) -> None:
    """Work grows with the mean size of the prompts' images, memory with the largest."""
    wide = changed(sdxl, "generate", sizes=[ImageSize(width=1024, height=2048), ImageSize(width=1024, height=1024)])
    prompts = [Prompt(f"p{number}", "a cat") for number in range(200)]
    images = Images.of(prompts, wide.generate)
    assert 1.3 * PIXELS < images.pixels < 1.7 * PIXELS
    work, square = (cost.round_cost(wide, side, Images(100)) for side in (images, Images(200)))
    assert work.generate.tflop == pytest.approx(square.generate.tflop * images.pixels / PIXELS)
    assert work.train.tflop == pytest.approx(square.train.tflop * images.pixels / PIXELS)
    assert memory.training_gb(wide) > 1.8 * memory.training_gb(sdxl) - 8
    own = Images.of([Prompt("a", "a cat", width=512, height=512)], wide.generate)
    assert own.pixels == 512 * 512
    assert memory.sampling_gb(sdxl, 2 * PIXELS) == pytest.approx(memory.sampling_gb(wide))


def test_shards_of_the_preset_are_250_to_500_mb(sdxl: Params) -> None:
    one = changed(sdxl, "select", top_fraction=1e-9)
    grown = cost.round_bytes(one, Images(29), Images(1)) - cost.round_bytes(one, Images(1), Images(1))
    assert 250e6 < grown < 500e6 and sdxl.generate.prompts_per_shard == 28


def test_device_names() -> None:
    assert cost.peak_tflops("NVIDIA H100 80GB HBM3") == cost.peak_tflops("NVIDIA H200") == 989
    assert cost.peak_tflops("NVIDIA H100 PCIe") == 756
    assert cost.peak_tflops("NVIDIA GeForce RTX 4090") == 165
    assert cost.peak_tflops("Quadro P400") is None
    assert all(cost.peak_tflops(name) for name in cost.EXAMPLES)
