"""The small records of an evaluation: metrics.json, guidance.csv, gate.json."""

from __future__ import annotations

import csv
from typing import Any

from srpo.errors import UserError
from srpo.rounds import RoundFiles
from srpo.storage.json_files import read_json, reading


def read_metrics(files: RoundFiles) -> dict[str, Any]:
    """The evaluation's `metrics.json` of a round, or of `base`."""
    path = files.evaluation / "metrics.json"
    found = read_json(path)
    if "verdict" not in found:
        raise UserError(f"{path}: damaged (no verdict); `dvc checkout` restores it")
    return found


def read_sweep(files: RoundFiles) -> dict[str, dict[str, float]]:
    """The evaluation's `guidance.csv` of a round, or of `base`: all measures, by guidance scale."""
    path = files.evaluation / "guidance.csv"
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
        return {row.pop("guidance"): {name: float(value) for name, value in row.items()} for row in rows}


def read_gate(files: RoundFiles) -> dict[str, Any]:
    """The evaluation's `gate.json` of a round: rules, verdict, finding, win rates and looks."""
    return read_json(files.evaluation / "gate.json")
