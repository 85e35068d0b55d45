"""What an adapter came from, written beside its weights, and the readers of the small JSON records."""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.base import write_json
from srpo.errors import MissingFile, UserError
from srpo.hashing import code_digest, file_digest
from srpo.params import STAGES_WITH_OVERRIDES, Params
from srpo.rounds import BASE, RoundFiles

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_FILE = "diffusion_pytorch_model.safetensors"


def require_weights(root: Path, key: str) -> None:
    """Check that a round has an adapter, so that it is never taken for base, which has none.

    Raises:
        UserError: its weights are missing.
    """
    adapter = RoundFiles(root, key).adapter
    if key != BASE and adapter_weights(adapter) is None:
        raise MissingFile(f"{adapter}: holds no weights; run train of round {key}, or `dvc checkout`")


def winners_of_ancestors(root: Path, parent: str) -> dict[str, str]:
    """The digests of the winners that the parent and the rounds before it had, by round, as its lineage has them."""
    if parent == BASE:
        return {}
    lineage = read_lineage(root, parent)
    return lineage.get("ancestors", {}) | {parent: lineage["winners"]}


def write_lineage(adapter: Path, params: Params, root: Path, key: str, winners: dict[str, str]) -> None:
    """Write `lineage.json` into a folder that already holds the adapter's weights.

    It names by sha256 the weights, the round's winners and those of all its ancestors, the parent's weights and the
    base model, with the rounds whose winners it was trained on, the round's resolved params, the code and the library
    versions. It holds no date and no path of this machine: the same training writes the same bytes.

    Args:
        winners: digests of the winners it was trained on, by round.
    """
    parent = params.rounds[key].parent
    resolved = params.for_round(key)
    parent_weights = adapter_weights(RoundFiles(root, parent).adapter)
    write_json(
        adapter / "lineage.json",
        {
            "round": key,
            "parent": parent,
            "base": read_lineage(root, BASE)["base"],
            "parent_adapter": None if parent == BASE else file_digest(parent_weights),
            "winners": winners[key],
            "ancestors": winners_of_ancestors(root, parent),
            "trained_on": list(winners),
            "adapter": file_digest(adapter_weights(adapter)),
            "params": {"seed": params.seed, "model": params.model.model_dump()}
            | {stage: getattr(resolved, stage).model_dump() for stage in STAGES_WITH_OVERRIDES},
            "code": code_digest(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        },
    )


def adapter_weights(adapter: Path) -> Path | None:
    """The weights in an adapter's folder, a LoRA's or a whole UNet's; None where there are none, as in base's."""
    found = (adapter / name for name in (WEIGHTS_FILE, UNET_FILE))
    return next((path for path in found if path.exists()), None)


def read_lineage(root: Path, key: str) -> dict[str, Any]:
    """The `lineage.json` of a round, or of `base`."""
    return _record(RoundFiles(root, key).adapter / "lineage.json")


def read_dvc_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock by name (`train@001`), each with `outs` and maybe `deps`; empty without a lock file."""
    from ruamel.yaml import YAML

    lock = root / "dvc.lock"
    if not lock.exists():
        return {}
    return (YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}


def read_metrics(root: Path, key: str) -> dict[str, Any]:
    """The evaluation's `metrics.json` of a round, or of `base`."""
    path = RoundFiles(root, key).evaluation / "metrics.json"
    found = _record(path)
    if "verdict" not in found:
        raise UserError(f"{path}: damaged (no verdict); `dvc checkout` restores it")
    return found


def read_sweep(root: Path, key: str) -> dict[str, dict[str, float]]:
    """The evaluation's `guidance.csv` of a round, or of `base`: all measures, by guidance scale."""
    path = RoundFiles(root, key).evaluation / "guidance.csv"
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
        return {row.pop("guidance"): {name: float(value) for name, value in row.items()} for row in rows}


def read_gate(root: Path, key: str) -> dict[str, Any]:
    """The evaluation's `gate.json` of a round: rules, verdict, finding, win rates and looks."""
    return _record(RoundFiles(root, key).evaluation / "gate.json")


def _record(path: Path) -> dict[str, Any]:
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in reading this file of a round is one line that names it.

    Raises:
        UserError: a `MissingFile` where it is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{path}: missing; run the stage that makes it, or `dvc checkout`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split()):.120}); `dvc checkout` restores it") from None
