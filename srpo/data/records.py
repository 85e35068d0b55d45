"""Records of an evaluation: metrics.json, guidance.csv, gate.json."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Protocol

from srpo.errors import UserError
from srpo.storage.json_files import read_json, reading


class HasEvaluation(Protocol):
    """The files of a round, such as `RoundFiles`."""

    @property
    def evaluation(self) -> Path:
        """The folder with the records of the evaluation."""


def read_metrics(files: HasEvaluation) -> dict[str, Any]:
    """Read the evaluation's `metrics.json` of a round, or of `base`."""
    path = files.evaluation / "metrics.json"
    metrics = read_json(path)
    if "verdict" not in metrics:
        raise UserError(f"{path}: damaged (no verdict); `dvc checkout` restores it")
    return metrics


def read_sweep(files: HasEvaluation) -> dict[str, dict[str, float]]:
    """Read the evaluation's `guidance.csv` of a round, or of `base`: all metrics, by guidance scale."""
    path = files.evaluation / "guidance.csv"
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
        return {row.pop("guidance"): {name: float(value) for name, value in row.items()} for row in rows}


def read_gate(files: HasEvaluation) -> dict[str, Any]:
    """Read the evaluation's `gate.json` of a round: rules, verdict, finding, win rates and image statistics."""
    return read_json(files.evaluation / "gate.json")
