"""A base whose weights fit into 8 bits: one model in every stage and dtype, whether it is stored so or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.lineage.identity import base_identity
from srpo.lineage.record import read_lineage
from srpo.models import fp8
from srpo.models.adapters import with_adapter
from srpo.release.export import merged_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.base import pin_base
from srpo.training.model import LoraModel
from tests.models.test_merging import base_unet, write_adapter
from tests.training.test_train import predict


@pytest.fixture
def params(shared_world: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(shared_world)
    return in_fp8(load_params())


def in_fp8(params: Params) -> Params:
    return params.model_copy(update={"model": params.model.model_copy(update={"fp8": True})})


def test_storage_changes_no_bit_of_the_rounded_base(params: Params) -> None:
    unet = base_unet(params, torch.float32)
    plain = base_unet(load_params(), torch.float32)
    expected = predict(unet)
    assert not torch.allclose(expected, predict(plain), atol=1e-4), "rounding makes another base"
    sixteen = base_unet(params, torch.bfloat16)
    for one, other in zip(fp8.layers(sixteen), fp8.layers(unet), strict=True):
        assert torch.equal(one.weight.float(), other.weight), "the same numbers in every dtype"
    fp8.store_in_fp8(unet)
    for _ in range(2):
        assert torch.equal(predict(unet), expected)
        stored = sum(weight.numel() for weight in unet.parameters() if weight.dtype == fp8.FP8)
        assert stored == sum(weight.numel() for layer in fp8.layers(plain) for weight in layer.parameters()) > 0
    assert unet.dtype == torch.float32, "the dtype that it computes in"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_beside_it_has_the_same_gradients(params: Params, dtype: torch.dtype, checkpointing: bool) -> None:
    settings = params.train.model_copy(update={"target_modules": ["to_q", "to_out.0", "conv1"]})

    def gradients(*, stored: bool) -> dict[str, torch.Tensor]:
        model = LoraModel(base_unet(params, dtype), settings, seed=0)
        unet = model.denoiser.unet.train()
        if stored:
            fp8.store_in_fp8(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(3)
        x, text, pooled = (
            torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((4, 4, 4), (16, 32), (16,))
        )
        conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=dtype)}
        predicted = unet(x, torch.tensor([10, 500]), text, added_cond_kwargs=conditions, return_dict=False)[0]
        predicted.float().square().sum().backward()
        return {name: value.grad for name, value in model.parameters.items() if value.grad is not None}

    plain, stored = gradients(stored=False), gradients(stored=True)
    assert plain and plain.keys() == stored.keys()
    assert all(torch.equal(plain[name], stored[name]) for name in plain)


def test_a_lora_is_sampled_beside_it_and_merged_into_an_export(params: Params, tmp_path: Path) -> None:
    write_adapter(params, tmp_path, 0.05)
    beside = with_adapter(base_unet(params, torch.float32), tmp_path, beside=True)
    fp8.store_in_fp8(beside)
    assert any(weight.dtype == fp8.FP8 for weight in beside.parameters()), "nothing was merged"
    expected = predict(beside)
    assert not torch.allclose(expected, predict(base_unet(params, torch.float32)), atol=1e-3)
    assert torch.allclose(predict(Sampler(params, tmp_path).unet), expected, atol=1e-5)
    assert torch.allclose(predict(merged_pipeline(params, tmp_path, "float32").unet), expected, atol=1e-5)


def test_it_is_another_base(world: Path) -> None:
    pin_base(Round.of(load_params(), world, "base"))
    plain = read_lineage(RoundFiles(world, "base"))["base"]
    pin_base(Round.of(in_fp8(load_params()), world, "base"))
    rounded = read_lineage(RoundFiles(world, "base"))["base"]
    assert rounded == plain | {"fp8": True}
    assert base_identity(rounded) != base_identity(plain)


@pytest.mark.parametrize("line", ["method: full", "use_dora: true"])
def test_what_needs_whole_weights_is_refused(world: Path, line: str) -> None:
    file = Path("params.yaml")
    text = file.read_text().replace("  base: data/base\n", "  base: data/base\n  fp8: true\n")
    file.write_text(text)
    load_params()
    file.write_text(text.replace("train:\n  rank", f"train:\n  {line}\n  rank"))
    with pytest.raises(UserError, match=r"^params\.yaml: model\.fp8: not possible with train\.method full or use_dora"):
        load_params()
