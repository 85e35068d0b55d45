"""LoRAs of the base model, in every format that people share, against diffusers' and PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from srpo.config.loader import load_params
from srpo.config.schema import BaseLora, ModelParams
from srpo.data import parquet
from srpo.errors import UserError
from srpo.lineage.record import check_base, read_lineage
from srpo.models.adapters import with_adapter
from srpo.models.original_layout import original_unet_name
from srpo.models.pipeline import load_pipeline
from srpo.preflight.models import check_models
from srpo.release.export import merged_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler, sample_images
from srpo.stages.base import pin_base
from srpo.stages.train import train
from tests.training.helpers import started

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "proj_in", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def plain_base() -> ModelParams:
    return load_params().model.model_copy(update={"loras": []})


def pipeline_with_lora(**options) -> StableDiffusionXLPipeline:
    """Return the base with random LoRA layers beside its UNet and text encoders, as PEFT computes them."""
    torch.manual_seed(3)
    pipeline = load_pipeline(plain_base(), torch.float32)
    for name in NETWORKS:
        modules = [*ATTENTION, *CONVOLUTIONS] if name == "unet" else TEXT
        config = LoraConfig(target_modules=modules, **{"r": 3, "lora_alpha": 3} | options)
        inject_adapter_in_model(config, getattr(pipeline, name))
    for network in NETWORKS:
        for parameter_name, parameter in getattr(pipeline, network).named_parameters():
            if "lora_" in parameter_name:
                noise = 0.2 * torch.randn_like(parameter)
                is_magnitude = "magnitude" in parameter_name
                parameter.data = parameter.data * (1 + noise) if is_magnitude else noise
    return pipeline


def layers(pipeline: StableDiffusionXLPipeline, network: str) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in get_peft_model_state_dict(getattr(pipeline, network)).items()}


def diffusers_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    parts = {f"{name}_lora_layers": convert_state_dict_to_diffusers(layers(pipeline, name)) for name in NETWORKS}
    metadata = {
        f"{name}_lora_adapter_metadata": getattr(pipeline, name).peft_config["default"].to_dict() for name in NETWORKS
    }
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **parts, **metadata)


def peft_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    state = {f"{name}.{key}": value for name in NETWORKS for key, value in layers(pipeline, name).items()}
    save_file(state, path)


def kohya_names(pipeline: StableDiffusionXLPipeline, original: bool) -> dict[str, torch.Tensor]:
    prefixes = dict(zip(NETWORKS, ("lora_unet", "lora_te1", "lora_te2"), strict=True))
    alpha = pipeline.unet.peft_config["default"].lora_alpha
    state = {}
    for network, prefix in prefixes.items():
        for key, value in layers(pipeline, network).items():
            module, _, part = (
                key.replace(".lora_magnitude_vector", ".dora_scale.weight").rpartition(".weight")[0].rpartition(".")
            )
            if network == "unet" and original:
                module = original_unet_name(pipeline.unet, f"{module}.weight").removesuffix(".weight")
            elif network != "unet" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            name = f"{prefix}_{module.replace('.', '_')}"
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
            part = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(part, "dora_scale")
            state[f"{name}.{part}"] = value.view(-1, *[1] * (value.ndim - 1)) if part == "dora_scale" else value
    return state


def kohya_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    save_file(kohya_names(pipeline, original=False), path)


def civitai_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    save_file(kohya_names(pipeline, original=True), path)


def outputs(pipeline: StableDiffusionXLPipeline) -> list[torch.Tensor]:
    """Return the UNet's prediction and both text encoders' outputs."""
    generator = torch.Generator().manual_seed(5)
    conditions = {"text_embeds": torch.randn(1, 16, generator=generator), "time_ids": torch.ones(1, 6)}
    x, text = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 16, 32, generator=generator)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        predicted = pipeline.unet(x, torch.tensor([400]), text, added_cond_kwargs=conditions, return_dict=False)[0]
        states = [getattr(pipeline, name)(ids, output_hidden_states=True).hidden_states[-1] for name in NETWORKS[1:]]
    return [predicted, *states]


def with_lora(path: str, scale: float = 1.0, **parts: None) -> StableDiffusionXLPipeline:
    model = load_params().model.model_copy(update={"loras": [BaseLora(path=path, scale=scale)]})
    return load_pipeline(model, torch.float32, **parts)


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (diffusers_file, {"lora_alpha": 1, "use_rslora": True}),
        (diffusers_file, {"use_dora": True, "lora_alpha": 6}),
        (peft_file, {"use_dora": True}),
        (kohya_file, {"lora_alpha": 1}),
        (civitai_file, {"use_dora": True, "lora_alpha": 2}),
    ],
)
def test_every_format_equals_the_layers(world: Path, write: Callable, options: dict) -> None:
    reference = pipeline_with_lora(**options)
    write(reference, world / "data" / "lora.safetensors")
    ours = with_lora("data/lora.safetensors")
    plain = outputs(load_pipeline(load_params().model, torch.float32))
    for mine, theirs, base in zip(outputs(ours), outputs(reference), plain, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(mine, base, atol=1e-2)


def test_the_scale_counts(world: Path) -> None:
    civitai_file(pipeline_with_lora(), world / "data" / "lora.safetensors")
    weight = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    base, one, half = (
        pipeline.unet.get_submodule(weight).weight
        for pipeline in (
            load_pipeline(load_params().model, torch.float32),
            with_lora("data/lora.safetensors"),
            with_lora("data/lora.safetensors", 0.5),
        )
    )
    assert torch.allclose(half - base, (one - base) / 2, atol=1e-6)
    text_only = with_lora("data/lora.safetensors", unet=None, vae=None)
    assert text_only.unet is None


def write_params_with_lora(world: Path) -> None:
    text = (world / "params.yaml").read_text()
    loras = "  loras: [{path: data/lora.safetensors, scale: 0.5}]\n"
    (world / "params.yaml").write_text(text.replace("  base: data/base\n", f"  base: data/base\n{loras}"))


def loha(state: dict) -> dict:
    return {f"{name.split('.')[0]}.hada_w1_a": value for name, value in state.items()}


def of_another_model(state: dict) -> dict:
    return {name.replace("unet_", "unet_double_blocks_0_"): value for name, value in state.items()}


def half_a_layer(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.endswith("lora_up.weight")}


def another_width(state: dict) -> dict:
    return {name: value[:, :3] if name.endswith("lora_down.weight") else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (loha, "holds LoHa, not LoRA"),
        (of_another_model, "that the base's unet lacks"),
        (half_a_layer, "holds only a part of"),
        (another_width, "does not fit the base's unet"),
    ],
)
def test_other_files_are_refused(world: Path, change: Callable, reason: str) -> None:
    file = world / "data" / "lora.safetensors"
    kohya_file(pipeline_with_lora(), file)
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    with pytest.raises(UserError, match=rf"^model\.loras\.0: data/lora.safetensors.*{reason}"):
        with_lora("data/lora.safetensors")


def test_a_lora_is_part_of_the_bases_identity(world: Path) -> None:
    write_params_with_lora(world)
    round = Round.of(load_params(), world, "base")
    assert [result.name for result in check_models(load_params(), world) if result.state == "fail"] == ["model.loras.0"]
    with pytest.raises(UserError, match=r"model\.loras\.0: data/lora.safetensors: no such file"):
        pin_base(round)
    kohya_file(pipeline_with_lora(), world / "data" / "lora.safetensors")
    pin_base(round)
    assert all(result.state == "ok" for result in check_models(load_params(), world))
    (lora,) = read_lineage(RoundFiles(world, "base"))["base"]["loras"]
    assert (lora["source"], lora["scale"]) == ("data/lora.safetensors", 0.5)
    kohya_file(pipeline_with_lora(lora_alpha=1), world / "data" / "lora.safetensors")
    pin_base(round)
    assert read_lineage(RoundFiles(world, "base"))["base"]["loras"][0]["digest"] != lora["digest"]
    with pytest.raises(UserError, match=r"model\.loras\.0: data/lora.safetensors has changed since stage base ran"):
        kohya_file(pipeline_with_lora(lora_alpha=2), world / "data" / "lora.safetensors")
        check_base(world)


@pytest.mark.slow
def test_rounds_start_from_the_base_with_its_loras(world: Path) -> None:
    """Candidates come from the base with its LoRA; the round's own LoRA is trained on top, and the merge has both."""
    write_params_with_lora(world)
    civitai_file(pipeline_with_lora(), world / "data" / "lora.safetensors")
    params = started(world)
    row = next(iter(parquet.read_rows(RoundFiles(world, "001").candidates)))
    sampler = Sampler(params)
    settings = params.generate
    embeds = sampler.encode([row["prompt"]])
    latents, _ = sample_images(sampler, embeds, [0], [row["seed"]], settings)
    assert row["latents"] == parquet.latents_bytes(latents[0].numpy())
    train(Round.of(params, world, "001"))
    lineage = read_lineage(RoundFiles(world, "001"))
    assert lineage["base"]["loras"] == read_lineage(RoundFiles(world, "base"))["base"]["loras"]
    merged_pipeline(params, RoundFiles(world, "001").adapter).save_pretrained(world / "merged")
    plain = StableDiffusionXLPipeline.from_pretrained(world / "merged")
    expected = with_lora("data/lora.safetensors", 0.5)
    expected.unet = with_adapter(expected.unet, RoundFiles(world, "001").adapter)
    for mine, theirs in zip(outputs(plain), outputs(expected), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
