"""Records of an evaluation: metrics.json, guidance.csv, drift.json, gate.json."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from srpo.data.metric_keys import IMAGE_SET_METRICS
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
        lines = file.readlines()
        rows = [dict(row) for row in csv.DictReader(lines)]
        if not rows or not lines[-1].endswith("\n") or any(None in row.values() for row in rows):
            raise ValueError("it is cut off")
        return {row.pop("guidance"): {name: float(value) for name, value in row.items() if value} for row in rows}


def write_sweep(path: Path, sweep: Mapping[str, Mapping[str, float]]) -> None:
    """Write a `guidance.csv`: all metrics, by guidance scale."""
    names = list(dict.fromkeys(name for record in sweep.values() for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["guidance", *names])
        writer.writeheader()
        writer.writerows({"guidance": guidance} | dict(values) for guidance, values in sweep.items())


def read_drift(files: HasEvaluation) -> dict[str, float]:
    """Read the evaluation's `drift.json` of a round: FID and KID against base's images at the reported guidance."""
    return read_json(files.evaluation / "drift.json")


def headline(sweep: Mapping[str, Mapping[str, float]], guidance: float, rewards: Iterable[str]) -> dict[str, Any]:
    """Return the numbers of metrics.json at one guidance: few and flat, so that `dvc metrics show` is readable.

    A mean over no finite score is None.
    """
    record = sweep[str(guidance)]
    names = [name for name in ("images", *rewards, *IMAGE_SET_METRICS) if name in record]
    metrics = {name: None if math.isnan(record[name]) else record[name] for name in names}
    return {"guidance": guidance} | metrics | {"images": int(record["images"])}


def read_gate(files: HasEvaluation) -> dict[str, Any]:
    """Read the evaluation's `gate.json` of a round: rules, verdict, finding, win rates, image statistics, votes.

    `human`, what people voted, is None without votes.
    """
    return {"human": None} | read_json(files.evaluation / "gate.json")
