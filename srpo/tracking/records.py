"""What MLflow should show of a round, read from files: no MLflow call in here changes anything."""

from __future__ import annotations

import csv
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo.config.loader import STAGES_WITH_OVERRIDES, Params
from srpo.data.metric_keys import IMAGE_STATS
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.lineage.dvc_lock import read_dvc_lock
from srpo.lineage.record import read_lineage
from srpo.reporting.table import SET_MEASURES, verdict
from srpo.rounds import BASE, Round, RoundFiles, ancestors, order
from srpo.storage.hashing import file_digest, value_digest

ARTIFACTS_TAG = "srpo.artifacts"
Point = tuple[str, float, int]
"""Metric name, value, step."""


@dataclass
class RoundRecord:
    """All of one round's child run."""

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    artifacts: list[tuple[Path, str | None]] = field(default_factory=list)
    datasets: dict[str, str] = field(default_factory=dict)

    @property
    def artifacts_digest(self) -> str:
        """Changes when an artifact's content does."""
        return value_digest([(path.name, folder, file_digest(path)) for path, folder in self.artifacts])


def campaign_points(params: Params, root: Path) -> list[Point]:
    """The campaign's curves: every measure of every evaluated round, with its depth in the tree as step."""
    points, taken = [], set()
    for key in (BASE, *order(params.rounds)):
        depth = 0 if key == BASE else len(ancestors(params.rounds, key)) + 1
        suffix = f"/{key}" if depth in taken else ""
        taken.add(depth)
        if not (RoundFiles(root, key).evaluation / "metrics.json").exists():
            continue
        metrics = read_metrics(RoundFiles(root, key))
        rates = [f"{judge}_win_rate{end}" for judge in params.reward_names("judge") for end in ("", "_low")]
        names = (*params.rewards, *SET_MEASURES, "drift_kid", *rates)
        values = {name: metrics[name] for name in names if name in metrics} | _selection(root, key)
        points += [(f"{name}{suffix}", float(value), depth) for name, value in values.items()]
    return points


def round_record(round: Round) -> RoundRecord:
    """Everything there is of one round (or base) on disk."""
    files, record = round.files, RoundRecord()
    hashes = round_hashes(round.root, round.key)
    record.tags = {f"dvc.{name}": value for name, value in hashes.items()}
    record.datasets = {name: hashes[name] for name in ("candidates", "winners") if name in hashes}
    if revision := _git_revision(round.root):
        record.tags["srpo.git_revision"] = revision
    if round.key != BASE:
        resolved = round.params
        record.params = _flat({stage: getattr(resolved, stage).model_dump() for stage in STAGES_WITH_OVERRIDES})
        record.params |= {"seed": str(round.params.seed), "parent": round.parent}
    record.params |= _flat({"model": round.params.model.model_dump()})
    if (files.adapter / "lineage.json").exists():
        lineage = read_lineage(round.files)
        base = lineage["base"]
        record.tags["srpo.base"] = f"{base['source']} {base['digest'] or base['revision'] or 'not pinned'}"
        if round.key != BASE:
            record.tags["srpo.adapter"] = lineage["adapter"]
            record.tags["srpo.parent_adapter"] = lineage["parent_adapter"] or "none"
            record.tags["srpo.winners"] = lineage["winners"]
            record.tags["srpo.code"] = lineage["code"]
        record.artifacts.append((files.adapter / "lineage.json", None))
    if files.training.exists():
        with files.training.open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                record.points += [(name, float(value), step) for name, value in row.items()]
    record.points += [(name, float(value), 0) for name, value in _selection(round.root, round.key).items()]
    if (files.evaluation / "metrics.json").exists():
        metrics = read_metrics(round.files)
        swept = (*round.params.rewards, "fid", "kid", "cmmd", "diversity", *IMAGE_STATS)
        sweep = {at: {name: values[name] for name in swept} for at, values in read_sweep(round.files).items()}
        measured = metrics | {"sweep": sweep}
        record.tags["srpo.verdict"] = verdict(metrics)
        record.artifacts.append((files.evaluation / "metrics.json", None))
        if round.key != BASE:
            gate = read_gate(round.files)
            rules = {name: rule["value"] for name, rule in gate["rules"].items()}
            measured |= {"gate": rules, "win_rate": gate["win_rate"]}
            record.artifacts.append((files.evaluation / "gate.json", None))
        record.points += [(f"eval/{name}", value, 0) for name, value in _numbers(measured).items()]
    for name in ("index.html", "winners.png", "tuned.png"):
        if (files.report / name).exists():
            record.artifacts.append((files.report / name, "report"))
    return record


def param_entities(values: dict[str, str]) -> list:
    """As MLflow's entities."""
    from mlflow.entities import Param

    return [Param(name, value) for name, value in values.items()]


def dataset_inputs(hashes: dict[str, str]) -> list:
    """Datasets as MLflow inputs, named by their DVC hash (the digest's limit of 36 characters just fits)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(name, digest, source_type="dvc", source=json.dumps({"dvc": digest})),
            [InputTag("mlflow.data.context", "candidates" if name == "candidates" else "training")],
        )
        for name, digest in hashes.items()
    ]


def _selection(root: Path, key: str) -> dict[str, float]:
    path = RoundFiles(root, key).winners / "selection.json"
    return _numbers(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else str(value)
    return found


def round_hashes(root: Path, key: str) -> dict[str, str]:
    """Hashes that dvc.lock records of this round's outputs, by their name under rounds/<key>/."""
    folder, found = f"rounds/{key}/", {}
    for stage in read_dvc_lock(root).values():
        for out in stage.get("outs", []):
            if out["path"].startswith(folder) and "md5" in out:
                found[out["path"].removeprefix(folder).replace("/", ".")] = out["md5"]
    return found


def _git_revision(root: Path) -> str | None:
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
