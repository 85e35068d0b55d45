"""What an adapter came from, written beside its weights, and the readers of the small JSON records."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from srpo.config.loader import STAGES_WITH_OVERRIDES
from srpo.errors import MissingFile, UserError
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.hashing import code_digest, digest, file_digest
from srpo.storage.json_files import read_json, write_json

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_FILE = "diffusion_pytorch_model.safetensors"


def require_weights(files: RoundFiles) -> None:
    """Check that a round has an adapter, so that it is never taken for base, which has none.

    Raises:
        UserError: its weights are missing.
    """
    if files.key != BASE and adapter_weights(files.adapter) is None:
        raise MissingFile(f"{files.adapter}: holds no weights; run train of round {files.key}, or `dvc checkout`")


def check_weights(adapter: Path) -> None:
    """Compare an adapter folder's weights with the sha256 in its `lineage.json`, if it has one.

    Raises:
        UserError: they are other bytes, or are missing.
    """
    record = adapter / "lineage.json"
    wanted = read_json(record).get("adapter") if record.exists() else None
    if wanted is None:
        return
    file = adapter_weights(adapter)
    if file is None:
        raise MissingFile(f"{adapter}: holds no weights; `dvc checkout` restores them, or rerun train")
    if file_digest(file) != wanted:
        raise UserError(
            f"{file}: damaged: not the bytes that lineage.json names; `dvc checkout` restores it, or rerun train"
        )


def check_pinned(root: Path, record: Path, name: str, key: str) -> None:
    """Compare a model's local folder or file with the digest that stage `base` wrote down; Hub models have none.

    Args:
        record: base's lineage.json or rewards.json; where it is not there, nothing is compared.
        name: which of the models in it.
        key: what names the model in params.yaml.

    Raises:
        UserError: it is not what it was.
    """
    pinned = (read_json(record) if record.exists() else {}).get(name) or {}
    wanted, source = pinned.get("digest"), root / pinned.get("source", "")
    if wanted and source.exists() and digest(source) != wanted:
        raise UserError(
            f"{key}: {pinned['source']} is not what stage base found there: if you changed it run `srpo base`,"
            " else it is damaged and `dvc checkout data.dvc` restores it"
        )


def check_base(root: Path) -> None:
    """`check_pinned` for the base model and its VAE.

    Raises:
        UserError: one is not what it was.
    """
    for name in ("base", "vae"):
        check_pinned(root, RoundFiles(root, BASE).adapter / "lineage.json", name, f"model.{name}")


def winners_of_ancestors(root: Path, parent: str) -> dict[str, str]:
    """The digests of the winners that the parent and the rounds before it had, by round, as its lineage has them."""
    if parent == BASE:
        return {}
    lineage = read_lineage(RoundFiles(root, parent))
    return lineage.get("ancestors", {}) | {parent: lineage["winners"]}


def write_lineage(adapter: Path, round: Round, winners: dict[str, str]) -> None:
    """Write `lineage.json` into a folder that already holds the adapter's weights.

    It names by sha256 the weights, the round's winners and those of all its ancestors, the parent's weights and the
    base model, with the rounds whose winners it was trained on, the round's resolved params, the code and the library
    versions. It holds no date and no path of this machine: the same training writes the same bytes.

    Args:
        winners: digests of the winners it was trained on, by round.
    """
    parent = round.parent
    resolved = round.params
    parent_weights = adapter_weights(round.parent_files.adapter)
    write_json(
        adapter / "lineage.json",
        {
            "round": round.key,
            "parent": parent,
            "base": read_lineage(round.base_files)["base"],
            "parent_adapter": None if parent == BASE else file_digest(parent_weights),
            "winners": winners[round.key],
            "ancestors": winners_of_ancestors(round.root, parent),
            "trained_on": list(winners),
            "adapter": file_digest(adapter_weights(adapter)),
            "params": {"seed": round.params.seed, "model": round.params.model.model_dump()}
            | {stage: getattr(resolved, stage).model_dump() for stage in STAGES_WITH_OVERRIDES},
            "code": code_digest(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        },
    )


def adapter_weights(adapter: Path) -> Path | None:
    """The weights in an adapter's folder, a LoRA's or a whole UNet's; None where there are none, as in base's."""
    found = (adapter / name for name in (WEIGHTS_FILE, UNET_FILE))
    return next((path for path in found if path.exists()), None)


def read_lineage(files: RoundFiles) -> dict[str, Any]:
    """The `lineage.json` of a round, or of `base`."""
    return read_json(files.adapter / "lineage.json")
