"""Device memory at SDXL's true size, with random weights, beside the estimates of `srpo check`."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from bench.random_sdxl import SDXL, TOKENS, build_networks
from srpo.config.loader import Params, load_params
from srpo.models.fp8 import round_to_fp8, store_in_fp8
from srpo.preflight import cost, memory
from srpo.training.model import LoraModel
from tests.gpu.helpers import DEVICE, marks, on
from tests.training.helpers import with_train

ENOUGH = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40e9
pytestmark = [*marks, pytest.mark.skipif(not ENOUGH, reason="needs 40 GB of device memory")]

TOLERANCE = 0.25
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    """SDXL's UNet in bfloat16."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        return build_networks(SDXL, DEVICE, only=("unet",))["unet"].eval()
    finally:
        torch.set_default_dtype(default)


@pytest.fixture
def preset() -> Params:
    return on(load_params(REPO / "presets" / "sdxl.yaml"), dtype="auto")


def predict(unet: torch.nn.Module, rows: int) -> torch.Tensor:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=DEVICE, dtype=torch.bfloat16)

    conditions = {"text_embeds": noise(1280), "time_ids": noise(6)}
    step = torch.tensor(500, device=DEVICE)
    return unet(noise(4, 128, 128), step, noise(TOKENS, 2048), added_cond_kwargs=conditions, return_dict=False)[0]


def peak_gb() -> float:
    """Return GB that tensors took at most since `torch.cuda.reset_peak_memory_stats`."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def reset() -> float:
    """Return GB in use, and forget the peak."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


def test_the_unet_takes_the_estimated_memory(unet: torch.nn.Module) -> None:
    weights = reset()
    assert weights == pytest.approx(2 * cost.UNET_WEIGHTS / 1e9, rel=0.05)
    with torch.inference_mode():
        predict(unet, 8)
    assert (peak_gb() - weights) / 8 == pytest.approx(memory.DENOISE_GB, rel=TOLERANCE)


def test_the_decoder_takes_the_estimated_memory() -> None:
    vae = build_networks(SDXL, DEVICE, only=("vae",))["vae"].to(torch.bfloat16).eval()
    weights = reset()
    with torch.inference_mode():
        vae.decode(torch.randn(4, 4, 128, 128, device=DEVICE, dtype=torch.bfloat16))
    assert (peak_gb() - weights) / 4 == pytest.approx(memory.DECODE_GB, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_training_takes_the_estimated_memory(unet: torch.nn.Module, preset: Params, checkpointing: bool) -> None:
    rows = 2
    params = on(with_train(preset, batch_size=rows), dtype="auto", train_batch_size=rows)
    params = on(params, dtype="auto", gradient_checkpointing=checkpointing)
    model = LoraModel(unet, params.train, 0)
    try:
        trained = list(model.parameters.values())
        unet.train()
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        optimizer = torch.optim.AdamW(trained)
        reset()
        for _ in range(2):  # the second step has AdamW's moments
            predict(unet, rows).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert peak_gb() == pytest.approx(memory.training_gb(params) - memory.CONTEXT_GB, rel=TOLERANCE)
    finally:
        unet.eval()
        unet.disable_gradient_checkpointing()
        unet.delete_adapters("default")


def test_weights_in_8_bits_take_the_estimated_memory(preset: Params) -> None:
    """Stored, and in a training with gradient checkpointing; the last test, since it changes the UNet."""
    before = reset()  # the UNet of the other tests
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        unet = build_networks(SDXL, DEVICE, only=("unet",))["unet"]
    finally:
        torch.set_default_dtype(default)
    keys = {"fp8": True, "batch_size": 1, "train_batch_size": 1, "gradient_checkpointing": True, "offload": True}
    params = memory.with_keys(with_train(preset, batch_size=1), keys)
    model = LoraModel(unet, params.train, 0)
    round_to_fp8(unet)
    store_in_fp8(unet)
    lora = 4 * cost.lora_weights(params.train)
    assert reset() - before == pytest.approx((memory.unet_gb(params) * 1e9 + lora) / 1e9, rel=0.05)
    trained = list(model.parameters.values())
    unet.train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):
        predict(unet, 1).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert peak_gb() - before == pytest.approx(memory.training_gb(params) - memory.CONTEXT_GB, rel=TOLERANCE)
