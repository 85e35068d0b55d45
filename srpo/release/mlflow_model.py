"""Adapters as MLflow models, for `mlflow.diffusers.load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srpo.config.loader import Params
from srpo.lineage import graph
from srpo.lineage.record import WEIGHTS_FILE, read_lineage
from srpo.rounds import Round
from srpo.storage.json_files import write_json


def save_model(folder: Path, round: Round, model_id: str, run_id: str | None) -> None:
    """Write a model folder: a LoRA's adapter folder in MLflow's diffusers flavor, and provenance.json.

    For a round that trained the whole UNet the folder has lineage.json instead of weights: gigabytes stay in DVC, and
    MLflow has no flavor for a UNet alone. So has it for a base with LoRAs, since the flavor loads one adapter only.

    Args:
        folder: the folder to make.
        model_id: id of MLflow's LoggedModel that gets the folder.
        run_id: id of the round's run, if there is one.
    """
    adapter = round.files.adapter
    base = read_lineage(round.files)["base"]
    if (adapter / WEIGHTS_FILE).exists() and not base.get("loras"):
        _save_lora(folder, round.params, adapter, base, model_id, run_id)
    else:
        write_json(folder / "lineage.json", read_lineage(round.files))
    write_json(folder / graph.FILE, graph.round_provenance(round.root, round.key).model_dump())


def _save_lora(
    folder: Path, params: Params, adapter: Path, base: dict[str, Any], model_id: str, run_id: str | None
) -> None:
    import mlflow.diffusers
    from mlflow.models import Model

    model = Model(run_id=run_id, model_id=model_id, model_uuid=model_id)
    # a relative path: for any other name MLflow asks the Hub, and for its newest revision
    mlflow.diffusers.save_model(
        adapter_path=str(adapter),
        path=str(folder),
        base_model="./base",
        mlflow_model=model,
        signature=_signature(params),
    )
    source = f"./{base['source']}" if base["digest"] else base["source"]
    model.flavors["diffusers"] |= {"base_model": source}
    if base["revision"]:
        model.flavors["diffusers"] |= {"base_model_revision": base["revision"]}
    model.save(str(folder / "MLmodel"))


def _signature(params: Params) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    settings = params.evaluate
    defaults = {
        "num_inference_steps": (DataType.integer, settings.num_inference_steps),
        "guidance_scale": (DataType.double, settings.guidance_scale),
        "height": (DataType.integer, settings.height),
        "width": (DataType.integer, settings.width),
        "negative_prompt": (DataType.string, ""),
    }
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, kind, value) for name, (kind, value) in defaults.items()]),
    )
