"""Base models as people have them: what loads, what `srpo check` says of it, and what is refused in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from srpo.config.loader import load_params
from srpo.config.schema import ModelParams
from srpo.errors import UserError
from srpo.lineage.checkpoint_files import check_checkpoint
from srpo.models.pipeline import load_pipeline
from srpo.preflight.models import check_models
from srpo.storage.hashing import digest

UNET = Path("data/base/unet/diffusion_pytorch_model.safetensors")
SCHEDULER = Path("data/base/scheduler/scheduler_config.json")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def model(**changes: object) -> ModelParams:
    return load_params().model.model_copy(update=changes)


def check_state(**changes: object) -> str:
    """Return what `srpo check` says of model.base."""
    params = load_params().model_copy(update={"model": model(**changes)})
    return next(one.state for one in check_models(params, Path.cwd()) if one.name == "model.base")


def rename_to_fp16(part: str) -> None:
    (file,) = Path("data/base", part).glob("*.safetensors")
    save_file({name: value.half() for name, value in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()


def test_sharded_weights_load(world: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained("data/base/unet")
    UNET.unlink()
    unet.save_pretrained("data/base/unet", max_shard_size="100KB")
    shards = sorted(Path("data/base/unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and check_state() == "ok"
    loaded = load_pipeline(model(), torch.float32).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())
    shards[0].unlink()
    assert check_state() == "fail"
    with pytest.raises(UserError, match=r"model\.base: data/base holds no unet/.*-of-.*safetensors"):
        load_pipeline(model(), torch.float32)


@pytest.mark.parametrize(
    "parts", [["unet"], ["text_encoder", "vae"], ["unet", "vae", "text_encoder", "text_encoder_2"]]
)
def test_variants_of_some_parts_load(world: Path, parts: list[str]) -> None:
    for part in parts:
        rename_to_fp16(part)
    assert check_state(variant="fp16") == "ok"
    load_pipeline(model(variant="fp16"), torch.float32)
    assert check_state() == "fail"
    with pytest.raises(UserError, match=r"model\.base: .*set model\.variant to fp16"):
        load_pipeline(model(), torch.float32)


def test_absolute_paths_load(world: Path) -> None:
    base = str(world / "data" / "base")
    assert check_state(base=base) == "ok"
    load_pipeline(model(base=base), torch.float32)


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", ".git/HEAD", ".cache/huggingface/unet.metadata", "unet/.config.json.swp"]
)
def test_side_files_are_not_part_of_the_identity(world: Path, name: str) -> None:
    base = Path("data/base")
    before = digest(base)
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).write_text("x")
    assert digest(base) == before
    (base / "unet" / "config.json").write_text("{}")
    assert digest(base) != before


def lfs_pointer() -> None:
    UNET.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5135149760\n")


def half_of_the_file() -> None:
    os.truncate(UNET, UNET.stat().st_size // 2)


def flow_matching() -> None:
    edit(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler")


def edm_sample() -> None:
    edit(SCHEDULER, _class_name="EDMEulerScheduler", prediction_type="sample")


def inpainting() -> None:
    edit(UNET.with_name("config.json"), in_channels=9)


def stable_diffusion_1() -> None:
    edit(UNET.with_name("config.json"), addition_embed_type=None)


def refiner() -> None:
    edit(Path("data/base/model_index.json"), text_encoder=[None, None])


def guidance_as_input() -> None:
    edit(UNET.with_name("config.json"), time_cond_proj_dim=256)


def without_tokenizer() -> None:
    shutil.rmtree("data/base/tokenizer_2")


def without_part() -> None:
    (UNET.parents[1] / "text_encoder" / "model.safetensors").unlink()


def without_configuration() -> None:
    UNET.with_name("config.json").unlink()


def another_prediction() -> None:
    edit(SCHEDULER, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lfs_pointer, "a Git-LFS pointer"),
        (half_of_the_file, "cut off after"),
        (flow_matching, "is for flow matching"),
        (edm_sample, "its prediction_type 'sample' is not supported"),
        (inpainting, "takes 9 channels"),
        (stable_diffusion_1, "as in Stable Diffusion 1.5 and 2"),
        (refiner, "is SDXL's refiner"),
        (guidance_as_input, "takes the guidance scale as an input"),
        (without_tokenizer, "holds no tokenizer_2/vocab.json"),
        (without_part, "holds no text_encoder/model.safetensors"),
        (without_configuration, "holds no unet/config.json"),
        (another_prediction, "its prediction_type 'flow_prediction' is not supported"),
    ],
)
def test_unsupported_bases_are_refused(world: Path, change: Callable[[], None], reason: str) -> None:
    check_checkpoint("model.base", Path("data/base"))
    change()
    assert check_state() == "fail"
    with pytest.raises(UserError, match=rf"^model\.base: .*{reason}.*; "):
        load_pipeline(model(), torch.float32)


def original(**shapes: list[int]) -> dict[str, torch.Tensor]:
    names = {
        "input": "model.diffusion_model.input_blocks.0.0.weight",
        "size": "model.diffusion_model.label_emb.0.0.weight",
        "text": "conditioner.embedders.1.model.ln_final.weight",
        "flux": "model.diffusion_model.double_blocks.0.img_attn.proj.weight",
    }
    return {names[name]: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"input": [8, 9, 3, 3], "size": [8, 2816], "text": [8]}, "9 channels"),
        ({"input": [8, 4, 3, 3]}, "Stable Diffusion 1.5 or 2"),
        ({"input": [8, 4, 3, 3], "size": [8, 2560]}, "refiner"),
        ({"input": [8, 4, 3, 3], "size": [8, 2816]}, "no text encoders"),
        ({"flux": [8, 8]}, "Flux"),
    ],
)
def test_unsupported_single_files_are_refused(tmp_path: Path, shapes: dict[str, list[int]], reason: str) -> None:
    file = tmp_path / "one.safetensors"
    save_file(original(**shapes), file)
    with pytest.raises(UserError, match=reason):
        check_checkpoint("model.base", file)


def test_damaged_single_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(original(input=[8, 4, 3, 3], size=[8, 2816], text=[8]), file)
    check_checkpoint("model.base", file)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"one\.safetensors: cut off after \d+ bytes"):
        check_checkpoint("model.base", file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6938040682\n")
    with pytest.raises(UserError, match=r"one\.safetensors: a Git-LFS pointer"):
        check_checkpoint("model.base", file)


def test_another_scheduler_keeps_the_noise_schedule(world: Path) -> None:
    own = load_pipeline(model(), torch.float32).scheduler
    options = {"timestep_spacing": "trailing", "use_karras_sigmas": True}
    other = load_pipeline(model(scheduler="DPMSolverMultistepScheduler", scheduler_config=options), torch.float32)
    config = other.scheduler.config
    assert type(other.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (config.timestep_spacing, config.use_karras_sigmas) == ("trailing", True)
    assert torch.equal(other.scheduler.alphas_cumprod, own.alphas_cumprod)
    with pytest.raises(UserError, match=r"model\.scheduler_config: .* has no option 'karras'"):
        load_pipeline(model(scheduler_config={"karras": True}), torch.float32)


@pytest.mark.parametrize("own", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_an_edm_scheduler_is_for_edm_bases(world: Path, own: str) -> None:
    options = {"sigma_min": 0.002, "sigma_max": 80.0} if own.startswith("EDM") else {}
    edit(SCHEDULER, _class_name=own, **options)
    is_edm = own.startswith("EDM")
    for name in ("EulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler"):
        if name.startswith("EDM") == is_edm:
            assert check_state(scheduler=name) == "ok"
            assert type(load_pipeline(model(scheduler=name), torch.float32).scheduler).__name__ == name
        else:
            assert check_state(scheduler=name) == "fail"
            with pytest.raises(UserError, match=r"^model\.scheduler: data/base is .*of the EDM kind"):
                load_pipeline(model(scheduler=name), torch.float32)


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="torchsde is installed")
@pytest.mark.parametrize("owner", ["base", "params"])
def test_a_missing_package_is_named(world: Path, owner: str) -> None:
    name = "DPMSolverSDEScheduler"
    if owner == "base":
        SCHEDULER.write_text(json.dumps(json.loads(SCHEDULER.read_text()) | {"_class_name": name}))
    options = {"scheduler": name} if owner == "params" else {}
    assert check_state(**options) == "fail"
    with pytest.raises(UserError, match=r"^model\.scheduler: DPMSolverSDEScheduler needs torchsde; `pip install"):
        load_pipeline(model(**options), torch.float32)
