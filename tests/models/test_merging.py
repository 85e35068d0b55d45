"""A LoRA in 16-bit weights: merged in float32 and rounded once, or kept beside them where rounding would lose it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srpo.config.loader import Params, load_params
from srpo.lineage.record import WEIGHTS_FILE
from srpo.models.adapters import with_adapter
from srpo.models.pipeline import load_pipeline
from srpo.training.model import LoraModel

TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))


@pytest.fixture
def params(shared_world: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(shared_world)
    return load_params()


def base_unet(params: Params, dtype: torch.dtype) -> torch.nn.Module:
    return load_pipeline(params.model, dtype, **TEXT).unet


def write_adapter(params: Params, folder: Path, size: float) -> dict[str, torch.Tensor]:
    """Write a LoRA that changes each weight by about `size` of itself; return its changes by weight."""
    settings = params.train.model_copy(update={"rank": 2, "target_modules": ["to_q", "to_out.0"]})
    trained = LoraModel(base_unet(params, torch.float32), settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {name: value for name, value in trained.denoiser.named_parameters() if "base_layer.weight" in name}
    for name, value in trained.parameters.items():
        value.data = torch.randn(value.shape, generator=generator)
        if "lora_B" in name:
            scale = weights[name.replace("lora_B.default", "base_layer")].std()
            value.data *= size * scale / 2**0.5
    trained.save(folder)
    state = load_file(folder / WEIGHTS_FILE)
    downs = {name: value for name, value in state.items() if name.endswith(".lora.down.weight")}
    assert downs
    return {
        name.removeprefix("unet.").replace(".lora.down.", "."): state[name.replace(".down.", ".up.")] @ down
        for name, down in downs.items()
    }


def test_a_large_change_is_merged_in_float32(params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "srpo")
    changes = write_adapter(params, tmp_path, 0.3)
    before = {name: value.clone() for name, value in base_unet(params, torch.bfloat16).state_dict().items()}
    merged = with_adapter(base_unet(params, torch.bfloat16), tmp_path).state_dict()
    assert merged.keys() == before.keys()
    for name, value in merged.items():
        exact = before[name].float() + changes[name] if name in changes else before[name]
        assert torch.equal(value, exact.to(torch.bfloat16)), name
    assert "merged into bfloat16 weights; " in caplog.text and "kept beside" not in caplog.text


def test_a_small_change_stays_beside_the_weights(
    params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The prediction moves as in float32; merged, most of the change would vanish."""
    caplog.set_level(logging.INFO, "srpo")
    write_adapter(params, tmp_path, 0.0005)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, 4, 4, 4, generator=generator), torch.randn(4, 16, 32, generator=generator)
    conditions = {"text_embeds": torch.randn(4, 16, generator=generator), "time_ids": torch.ones(4, 6)}

    @torch.no_grad()
    def predict(unet: torch.nn.Module) -> torch.Tensor:
        x, text = (value.to(unet.dtype) for value in inputs)
        given = {name: value.to(unet.dtype) for name, value in conditions.items()}
        return unet(x, torch.tensor(500), text, added_cond_kwargs=given, return_dict=False)[0].float()

    beside = with_adapter(base_unet(params, torch.bfloat16), tmp_path)
    assert "kept beside the weights; merged into bfloat16 only" in caplog.text
    merged = with_adapter(base_unet(params, torch.float32), tmp_path, stored_as=torch.bfloat16).to(torch.bfloat16)
    assert not getattr(merged, "peft_config", None)
    assert caplog.text.count("merged into bfloat16 weights") == 1, "what an export loses is said"
    weights = beside.state_dict()
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = weights[f"{layer}.lora_B.default.weight"].float() @ weights[f"{layer}.lora_A.default.weight"].float()
    exact = write_adapter(params, tmp_path / "again", 0.0005)[f"{layer}.weight"]
    assert torch.allclose(lora, exact, rtol=0.05, atol=exact.abs().max().item() / 50)
    stored = weights[f"{layer}.base_layer.weight"].float()
    rounded = merged.state_dict()[f"{layer}.weight"].float() - stored
    assert (rounded - exact).norm() > 0.7 * exact.norm(), "merged, most of it is lost"
    assert torch.isfinite(predict(beside)).all()
