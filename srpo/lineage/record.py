"""lineage.json, the record of an adapter's origin beside its weights."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo.config.loader import STAGES_WITH_OVERRIDES
from srpo.errors import MissingFile, UserError
from srpo.lineage.code import code_digest
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.hashing import digest, file_digest
from srpo.storage.json_files import read_json, write_json

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_FILE = "diffusion_pytorch_model.safetensors"


def require_weights(files: RoundFiles) -> None:
    """Check that a round has adapter weights; without them it would be sampled as the base model.

    Raises:
        UserError: they are missing.
    """
    if files.key != BASE and adapter_weights(files.adapter) is None:
        raise MissingFile(
            f"{files.adapter}: no weights; `srpo train {files.key}` makes them, `dvc checkout` restores them"
        )


def check_weights(adapter: Path) -> None:
    """Compare an adapter folder's weights with the sha256 in its lineage.json, if it has one.

    Raises:
        UserError: they differ or are missing.
    """
    record = adapter / "lineage.json"
    wanted = read_json(record).get("adapter") if record.exists() else None
    if wanted is None:
        return
    file = adapter_weights(adapter)
    if file is None:
        raise MissingFile(f"{adapter}: no weights; `dvc checkout` restores them, or rerun train")
    if file_digest(file) != wanted:
        raise UserError(
            f"{file}: damaged (its sha256 is not the one in lineage.json); `dvc checkout` restores it, or rerun train"
        )


def check_pinned(root: Path, record: Path, name: str, key: str) -> None:
    """Compare a model's local folder or file with the digest that stage `base` recorded; Hub models have none.

    Args:
        record: base's lineage.json or rewards.json; without it nothing is compared.
        name: the model's key in it.
        key: the key of params.yaml that names the model, for messages.

    Raises:
        UserError: the model has changed.
    """
    _check_unchanged(root, (read_json(record) if record.exists() else {}).get(name) or {}, key)


def _check_unchanged(root: Path, pinned: Mapping[str, Any], key: str) -> None:
    wanted, source = pinned.get("digest"), root / pinned.get("source", "")
    if wanted and source.exists() and digest(source) != wanted:
        raise UserError(
            f"{key}: {pinned['source']} has changed since stage base ran; if you changed it, run `srpo base`;"
            " otherwise it is damaged, and `dvc checkout data.dvc` restores it"
        )


def check_base(root: Path) -> None:
    """Run `check_pinned` for the base model, its VAE and its LoRAs.

    Raises:
        UserError: one of them has changed.
    """
    record = RoundFiles(root, BASE).adapter / "lineage.json"
    for name in ("base", "vae"):
        check_pinned(root, record, name, f"model.{name}")
    base = (read_json(record) if record.exists() else {}).get("base") or {}
    for number, lora in enumerate(base.get("loras", ())):
        _check_unchanged(root, lora, f"model.loras.{number}")


def winners_of_ancestors(root: Path, parent: str) -> dict[str, str]:
    """Return the digests of the winners of the parent and of all rounds before it, by round, from its lineage.json."""
    if parent == BASE:
        return {}
    lineage = read_lineage(RoundFiles(root, parent))
    return lineage.get("ancestors", {}) | {parent: lineage["winners"]}


def write_lineage(adapter: Path, round: Round, winners: dict[str, str]) -> None:
    """Write lineage.json into a folder that already holds the adapter's weights.

    It has the sha256 of the weights, of the winners of the round and of all its ancestors, of the parent's weights and
    of the base model; the rounds whose winners it was trained on; the resolved params; the code's digest; and library
    versions. It has no date and no path of the machine, so the same training writes the same bytes.

    Args:
        winners: digests of the winners it was trained on, by round.
    """
    parent, params = round.parent, round.params
    write_json(
        adapter / "lineage.json",
        {
            "round": round.key,
            "parent": parent,
            "base": read_lineage(round.base_files)["base"],
            "parent_adapter": None if parent == BASE else _weights_digest(round.parent_files.adapter),
            "winners": winners[round.key],
            "ancestors": winners_of_ancestors(round.root, parent),
            "trained_on": list(winners),
            "adapter": _weights_digest(adapter),
            "params": {"seed": params.seed, "model": params.model.model_dump()}
            | {stage: getattr(params, stage).model_dump() for stage in STAGES_WITH_OVERRIDES},
            "code": code_digest(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        },
    )


def adapter_weights(adapter: Path) -> Path | None:
    """Return the path of an adapter folder's weights, of a LoRA or a whole UNet; None if it has none, like base's."""
    found = (adapter / name for name in (WEIGHTS_FILE, UNET_FILE))
    return next((path for path in found if path.exists()), None)


def _weights_digest(adapter: Path) -> str:
    weights = adapter_weights(adapter)
    if weights is None:
        raise MissingFile(f"{adapter}: no weights; `dvc checkout` restores them, or rerun train")
    return file_digest(weights)


def read_lineage(files: RoundFiles) -> dict[str, Any]:
    """Return the lineage.json of a round, or of `base`."""
    return read_json(files.adapter / "lineage.json")
