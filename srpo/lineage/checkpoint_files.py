"""What a base model's files hold, from configurations and safetensors headers; reads no weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from srpo.config.schema import SchedulerName
from srpo.errors import UserError

SCHEDULERS = get_args(SchedulerName)
SDE = "DPMSolverSDEScheduler"
WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
REMEDY = "use an SDXL base that predicts epsilon, v or the sample"
UNET_CLASS = "UNet2DConditionModel"
POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
SIZE_EMBEDDING = "model.diffusion_model.label_emb.0.0.weight"
SECOND_TEXT_ENCODER = "conditioner.embedders.1.model.ln_final.weight"
EDM_WEIGHTS = "a base of the EDM kind has loss weights of its own; set it to null"
# tensors that mark one-file checkpoints of the EDM kind: Playground v2.5's, and those of CosXL
EDM_MEAN, EDM_STD = "edm_mean", "edm_std"
EDM_SIGMA_MAX, EDM_SIGMA_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
EDM_SCALING_FACTOR = 0.5  # of Playground v2.5's latents, beside their mean and standard deviation
REFINER_CONDITIONING = 2560  # the base's is 2816
OTHER_MODELS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "down_blocks.": "a UNet alone, in diffusers' names",
    "lora_": "a LoRA",
}


def check_checkpoint(
    key: str, path: Path, variant: str | None = None, own_vae: bool = True, scheduler: str | None = None
) -> None:
    """Check that a local base model is complete and of a supported kind.

    Args:
        key: the key of params.yaml that names it, for error messages.
        path: a pipeline's folder in diffusers' layout, or one `.safetensors` file in Stability's layout.
        variant: of the weight files, such as fp16; parts that lack it are read without.
        own_vae: whether its VAE is needed.
        scheduler: the class of diffusers that samples instead of its own.

    Raises:
        UserError: a file is missing, damaged or a Git-LFS pointer, or the model is of another kind; or its scheduler
            needs a package that is not installed.
    """
    if path.is_file():
        _check_single_file(key, path)
    else:
        _check_folder(key, path, variant, own_vae)
        scheduler = scheduler or _scheduler_config(key, path)["_class_name"]
    if scheduler == SDE and not find_spec("torchsde"):
        raise UserError(f"model.scheduler: {SDE} needs torchsde; `pip install torchsde`, or set another scheduler")
    if scheduler and is_edm(scheduler) != is_edm_checkpoint(path):
        kind = "is of the EDM kind" if is_edm_checkpoint(path) else "is not of the EDM kind"
        raise UserError(f"model.scheduler: {path} {kind}, so {scheduler} can't sample from it; take another one")


def lora_file(key: str, root: Path, source: str) -> Path:
    """Return the file of a LoRA: a file itself, or the one LoRA in a folder.

    Args:
        key: of params.yaml, for messages.
        source: relative to `root`.

    Raises:
        UserError: there is none, or several, or it is not a safetensors file, damaged or a Git-LFS pointer.
    """
    path = root / source
    if not path.exists():
        raise UserError(f"{key}: {source}: no such file or folder; `dvc pull` fetches what is under DVC")
    if path.is_dir():
        usual = path / "pytorch_lora_weights.safetensors"
        files = [usual] if usual.exists() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{key}: {source} holds {len(files)} .safetensors files; name the file of the LoRA")
        path = files[0]
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: {source} is not a .safetensors file; only safetensors are loaded")
    _header(key, path)
    return path


def unsupported(scheduler: Mapping[str, Any], unet: Mapping[str, Any]) -> str | None:
    """Return why a base with these two configurations of diffusers is not supported, or None."""
    name = scheduler.get("_class_name", "")
    if name.startswith("FlowMatch"):
        return f"its {name} is for flow matching, which is not supported"
    if name not in SCHEDULERS:
        return f"its scheduler {name or 'without a name'} is not supported"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in (("epsilon", "v_prediction") if is_edm(name) else ("epsilon", "v_prediction", "sample")):
        return f"its prediction_type {prediction!r} is not supported"
    if unet.get("in_channels", 4) != 4:
        return f"its UNet takes {unet['in_channels']} channels, as for inpainting, which is not supported"
    if unet.get("addition_embed_type") != "text_time":
        return "its UNet is not SDXL's (no size conditioning), as in Stable Diffusion 1.5 and 2"
    if unet.get("time_cond_proj_dim"):
        return "its UNet takes the guidance scale as an input, which is not supported"
    return None


def is_edm(scheduler: str) -> bool:
    """Return whether a class of diffusers' schedulers is for EDM's preconditioning (Karras et al., 2022)."""
    return scheduler.startswith("EDM")


def is_edm_checkpoint(path: Path) -> bool:
    """Return whether a local base, a folder or one file that `check_checkpoint` has passed, is of the EDM kind."""
    if path.is_file():
        return not read_header(path).keys().isdisjoint((EDM_MEAN, EDM_SIGMA_MAX))
    return is_edm(_scheduler_config("model.base", path)["_class_name"])


def weights_variant(folder: Path, part: str, variant: str | None) -> str | None:
    """Return the variant that a part's weights are to be loaded with: the one asked for where the part has it."""
    return variant if variant and _weight_files(folder / part, WEIGHTS[part], variant) else None


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: dtype, shape and offsets by tensor.

    Raises:
        UserError: it is not a safetensors file, is cut off, or is a Git-LFS pointer.
    """
    with file.open("rb") as stream:
        start = stream.read(64)
        if start.startswith(POINTER):
            raise UserError(f"{file}: a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository")
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\xff"))
        stream.seek(8)
        text = stream.read(length) if length <= LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a safetensors file, or damaged; download it again") from None
    if file.stat().st_size < 8 + length + end:
        raise UserError(f"{file}: cut off after {file.stat().st_size} bytes; download it again")
    return header


def scheduler_options(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler's options that the marker tensors of a one-file checkpoint stand for.

    `v_pred` and `ztsnr` are the markers that ComfyUI, Forge and NoobAI's checkpoints use.
    """
    options: dict[str, Any] = {}
    if "v_pred" in header:
        options["prediction_type"] = "v_prediction"
    if "ztsnr" in header:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return options


def _check_single_file(key: str, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"{key}: {file} is not a .safetensors file; only safetensors are loaded")
    header = _header(key, file)
    if UNET_INPUT not in header:
        kind = next((kind for part, kind in OTHER_MODELS.items() if any(part in name for name in header)), "no SDXL")
        raise UserError(f"{key}: {file} holds {kind}; name a whole checkpoint in Stability's layout, or a folder")
    channels = header[UNET_INPUT]["shape"][1]
    if channels != 4:
        raise UserError(f"{key}: {file}: its UNet takes {channels} channels, as for inpainting; {REMEDY}")
    if SIZE_EMBEDDING not in header:
        raise UserError(f"{key}: {file} is Stable Diffusion 1.5 or 2; {REMEDY}")
    if header[SIZE_EMBEDDING]["shape"][1] == REFINER_CONDITIONING:
        raise UserError(f"{key}: {file} is SDXL's refiner; name the base model")
    if SECOND_TEXT_ENCODER not in header:
        raise UserError(f"{key}: {file} holds no text encoders; name a whole checkpoint")


def _check_folder(key: str, folder: Path, variant: str | None, own_vae: bool) -> None:
    index = _read_config(key, folder / "model_index.json")
    if "unet" not in index:
        raise UserError(f"{key}: {folder} is a {index.get('_class_name', 'model')}, not SDXL; {REMEDY}")
    if index["unet"][1] != UNET_CLASS:
        raise UserError(f"{key}: {folder}: its unet is a {index['unet'][1]}, not a {UNET_CLASS}; {REMEDY}")
    if index.get("text_encoder", [None])[0] is None and "text_encoder_2" in index:
        raise UserError(f"{key}: {folder} is SDXL's refiner; name the base model")
    reason = unsupported(_scheduler_config(key, folder), _read_config(key, folder / "unet" / "config.json"))
    if reason:
        raise UserError(f"{key}: {folder}: {reason}; {REMEDY}")
    if variant and not any(_weight_files(folder / part, stem, variant) for part, stem in WEIGHTS.items()):
        raise UserError(f"model.variant: {folder} has no file of the variant {variant!r}; leave the key out")
    for part in ("tokenizer", "tokenizer_2"):
        if not any((folder / part / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"{key}: {folder} holds no {part}/vocab.json; bring the whole model there")
    for part, stem in WEIGHTS.items():
        if part == "vae" and not own_vae:
            continue
        _read_config(key, folder / part / "config.json")
        files = _weight_files(folder / part, stem, variant) or _weight_files(folder / part, stem, None)
        if not files:
            other = sorted(folder.glob(f"{part}/{stem}.*.safetensors"))
            hint = "bring the whole model there"
            if other and "-of-" not in other[0].name:
                hint = f"it holds {other[0].name}: set model.variant to {other[0].name.split('.')[-2]}"
            raise UserError(f"{key}: {folder} holds no {part}/{stem}.safetensors; {hint}")
        for file in files:
            if not file.is_file():
                raise UserError(f"{key}: {folder} holds no {part}/{file.name}; bring the whole model there")
            _header(key, file)


def _scheduler_config(key: str, folder: Path) -> dict[str, Any]:
    """Return the scheduler's configuration, with the class of model_index.json where it names none."""
    index = _read_config(key, folder / "model_index.json")
    config = _read_config(key, folder / "scheduler" / "scheduler_config.json")
    return {"_class_name": index.get("scheduler", [None, ""])[1]} | config


def _header(key: str, file: Path) -> dict[str, Any]:
    try:
        return read_header(file)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _read_config(key: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        name = file.name if file.name == "model_index.json" else f"{file.parent.name}/{file.name}"
        folder = file.parent if file.name == "model_index.json" else file.parents[1]
        raise UserError(f"{key}: {folder} holds no {name}; bring the whole model there") from None
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} is not a JSON object; bring the whole model there")
    return config


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the safetensors files of a part in this variant, by its index where it is sharded; none if it has none."""
    whole = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    if whole.exists() or whole.is_symlink():
        return [whole]
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: damaged; bring the whole model there") from None
    return [folder / name for name in sorted(names)]
