"""Export of a round: a folder of weights, images and model card, ready for the Hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.errors import UserError
from srpo.lineage import graph
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, read_lineage
from srpo.release import model_card
from srpo.rounds import Round, RoundFiles
from srpo.storage.hashing import file_digest
from srpo.storage.json_files import write_json

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

NUM_IMAGES = 8
MERGED = "merged"
MAGNITUDE = ".lora_magnitude_vector"
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def export(
    round: Round,
    to: Path,
    *,
    merged: bool = False,
    single_file: bool = False,
    dtype: str = "auto",
) -> list[str]:
    """Write a round's weights, example images, lineage and model card into a new folder.

    A LoRA is written for diffusers (`pytorch_lora_weights.safetensors`, a copy of the adapter's file) and with kohya's
    names, for ComfyUI. A round that trained the whole UNet has no LoRA, only merged weights.

    Args:
        to: a folder that does not exist or is empty.
        merged: also write `merged/`, the base pipeline with the fine-tuned weights in it, in diffusers' layout.
        single_file: also write that pipeline as one file in Stability's layout, for ComfyUI, A1111 and Forge.
        dtype: of merged weights: float32, bfloat16, float16, or auto for that of `runtime`.

    Returns:
        The names of the files and folders in it.

    Raises:
        UserError: the folder is not empty; the round has no adapter or no evaluation in this project folder; or it
            has no LoRA and nothing merged is asked for.
    """
    adapter = round.files.adapter
    is_lora = (adapter / WEIGHTS_FILE).exists()
    if not is_lora and not (adapter / UNET_FILE).exists():
        raise UserError(
            f"rounds/{round.key}/adapter: no weights; `dvc repro train@{round.key}` or `dvc pull train@{round.key}`"
        )
    if not is_lora and not merged and not single_file:
        raise UserError(
            f"round {round.key}: train.method is full, so there is no LoRA to export; add --merged or --single-file"
        )
    if not (round.files.evaluation / "gate.json").exists():
        raise UserError(
            f"rounds/{round.key}/evaluation: not evaluated, so it has no model card; `dvc repro gate@{round.key}`"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to: {to} is not empty; name a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        folder = Path(temporary) / "export"
        name = f"{round.params.tracking.campaign}-{round.key}".replace("/", "-")
        files: dict[str, str] = {}
        if is_lora:
            files |= {"diffusers": WEIGHTS_FILE, "kohya": f"{name}_kohya.safetensors"}
        if merged:
            files["merged"] = MERGED
        if single_file:
            files["single_file"] = f"{name}.safetensors"
        _fill(folder, round, files, dtype)
        folder.replace(to)
    return sorted(path.name for path in to.iterdir())


def write_kohya(adapter: Path, path: Path) -> None:
    """Write a diffusers LoRA with kohya's names.

    They are `lora_unet_<module>`, of text encoders `lora_te1_<module>` and `lora_te2_<module>`, with
    `.lora_down.weight`, `.lora_up.weight`, `.alpha` and, of a DoRA, `.dora_scale`. Values do not change. Alpha is the
    rank, so the scale is 1, as in training.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    from srpo.models.adapter_files import read_adapter_file

    states = read_adapter_file(adapter / WEIGHTS_FILE)
    layers = {f"{network}.{name}": value for network, state in states.items() for name, value in state.items()}
    magnitudes = {name: layers.pop(name) for name in list(layers) if name.endswith(MAGNITUDE)}
    state = convert_state_dict_to_kohya(layers)
    for name, value in magnitudes.items():
        network, _, module = name.removesuffix(MAGNITUDE).partition(".")
        module = f"{KOHYA_PREFIXES[network]}_{module.replace('.', '_')}"
        ups = state[f"{module}.lora_up.weight"]
        state[f"{module}.dora_scale"] = value.view(-1, *[1] * (ups.ndim - 1))
    ranks = sorted({int(value) for name, value in state.items() if name.endswith(".alpha")})
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",  # WebUIs filter LoRAs by it
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[-1]),
        "ss_network_alpha": str(ranks[-1]),
        "srpo_adapter_sha256": file_digest(adapter / WEIGHTS_FILE),
    }
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=metadata)


def _fill(folder: Path, round: Round, files: dict[str, str], dtype: str) -> None:
    """Write the files of these kinds, and what accompanies them."""
    adapter = round.files.adapter
    folder.mkdir()
    if "diffusers" in files:
        shutil.copyfile(adapter / WEIGHTS_FILE, folder / files["diffusers"])
        write_kohya(adapter, folder / files["kohya"])
    if {"merged", "single_file"} & files.keys():
        pipeline = merged_pipeline(round.params, adapter, dtype)
        if "merged" in files:
            pipeline.save_pretrained(folder / files["merged"], safe_serialization=True)
        if "single_file" in files:
            _write_single_file(pipeline, round, folder / files["single_file"])
    images = _write_images(round.files, folder / "images")
    write_json(folder / "lineage.json", read_lineage(round.files))
    write_json(folder / graph.FILE, graph.round_provenance(round.root, round.key).model_dump())
    text = model_card.render_card(round, files, [(f"images/{name}", prompt) for name, prompt in images])
    (folder / "README.md").write_text(text, encoding="utf-8")


def merged_pipeline(params: Params, adapter: Path, dtype: str = "auto") -> StableDiffusionXLPipeline:
    """Return the base pipeline with its LoRAs and an adapter merged into it, in float32 and rounded once.

    Args:
        dtype: float32, bfloat16, float16, or auto for that of `runtime`.

    Raises:
        UserError: the base or the adapter can't be loaded.
    """
    import torch

    from srpo.models.adapters import apply_lora, with_adapter
    from srpo.models.pipeline import TEXT_ENCODERS, load_pipeline
    from srpo.runtime.device import pick_device, pick_dtype

    stored_as = pick_dtype(params.runtime, pick_device(params.runtime)) if dtype == "auto" else getattr(torch, dtype)
    pipeline = load_pipeline(params.model, torch.float32)
    pipeline.unet = with_adapter(pipeline.unet, adapter, stored_as=stored_as)
    apply_lora({name: getattr(pipeline, name) for name in TEXT_ENCODERS}, adapter, stored_as=stored_as)
    return pipeline.to(stored_as)


def _write_single_file(pipeline: StableDiffusionXLPipeline, round: Round, path: Path) -> None:
    """Write a pipeline in Stability's layout, with the marker tensors and metadata by which programs know its kind."""
    from safetensors.torch import save_file

    from srpo.models.original_layout import to_original_layout

    is_v = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "srpo_adapter_sha256": str(read_lineage(round.files)["adapter"]),
    }
    save_file(to_original_layout(pipeline), path, metadata=metadata)


def _write_images(files: RoundFiles, folder: Path) -> list[tuple[str, str]]:
    """Write the first image of each of the first held-out prompts; return (file name, prompt) of each."""
    folder.mkdir()
    rows = parquet.read_rows(files.evaluation / "samples.parquet", ["prompt_id", "prompt", "index", "image"])
    first = [row for row in rows if row["index"] == 0][:NUM_IMAGES]
    for row in first:
        decode_image(row["image"]).save(folder / f"{row['prompt_id']}.png")
    return [(f"{row['prompt_id']}.png", row["prompt"]) for row in first]
