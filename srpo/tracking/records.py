"""Records of a round for MLflow, read from its files. Nothing in this module calls MLflow."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo.config.loader import STAGES_WITH_OVERRIDES, Params
from srpo.config.tree import ancestors, order
from srpo.data.metric_keys import IMAGE_STATS
from srpo.data.records import read_metrics, read_sweep
from srpo.lineage.dvc_lock import read_dvc_lock, recorded, round_hashes
from srpo.lineage.identity import base_identity
from srpo.lineage.record import read_lineage
from srpo.reporting.table import set_measures, show, verdict
from srpo.rounds import BASE, Round
from srpo.storage import git
from srpo.storage.hashing import value_digest

Point = tuple[str, float, int]
"""Name, value and step of a metric."""
LONGEST_PARAM = 6000  # MLflow's limit
GUIDANCE_STEPS = 100  # the step of a sweep's point is guidance times this, as steps are whole numbers


@dataclass
class Record:
    """What a run in MLflow should have.

    Attributes:
        weights: of a round's run, the identity of its weights: sha256 of the adapter, or base's digest or revision.
        curves: points by what they are of: of a round's run, `training` with the optimizer step; and `evaluation` with
            headline numbers at step 0 and the guidance sweep at guidance x 100.
        params: resolved settings, values cut at MLflow's limit.
        datasets: DVC's hashes of the round's datasets, by name.
        artifacts: files by their paths in MLflow.
    """

    weights: str = ""
    curves: dict[str, list[Point]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)


def round_record(round: Round) -> Record | None:
    """Return everything that the files of a round, or of base, have for MLflow; None before it has an adapter."""
    files = round.files
    if not (files.adapter / "lineage.json").exists():
        return None
    lineage, hashes = read_lineage(files), round_hashes(round.root, round.key)
    base, identity = lineage["base"], base_identity(lineage["base"])
    tags = {f"dvc.{name}": value for name, value in hashes.items()}
    tags["srpo.base"] = f"{base['source']} {identity or 'not pinned'}"
    if revision := git.revision(round.root):
        tags["srpo.git_revision"] = revision
    if round.key != BASE:
        names = ("adapter", "parent_adapter", "winners", "code")
        tags |= {f"srpo.{name}": lineage[name] or "none" for name in names}
    paths = {
        "lineage.json": files.adapter / "lineage.json",
        "selection.json": files.winners / "selection.json",
        **{name: files.evaluation / name for name in ("metrics.json", "gate.json", "guidance.csv")},
        **{f"report/{name}": files.report / name for name in ("index.html", "winners.png", "tuned.png")},
    }
    record = Record(
        weights=lineage["adapter"] if round.key != BASE else identity or base["source"],
        tags=tags,
        params=round_params(round),
        datasets={name: hashes[name] for name in ("candidates", "winners") if name in hashes},
        artifacts={name: path for name, path in paths.items() if path.exists()},
    )
    if files.training.exists():
        record.curves["training"] = _training_points(files.training)
    if "metrics.json" in record.artifacts:
        metrics = read_metrics(files)
        numbers = headline(round.params, metrics)
        tags["srpo.verdict"] = verdict(metrics)
        tags["mlflow.note.content"] = (  # what MLflow's page of the round shows above its metrics
            f"{', '.join(f'{name} {show(value)}' for name, value in numbers.items())}\n\n"
            f"Gate: {verdict(metrics)}. Metrics under `sweep/` have guidance x {GUIDANCE_STEPS} as step."
        )
        record.curves["evaluation"] = [*((name, value, 0) for name, value in numbers.items()), *_sweep_points(round)]
    return record


def round_params(round: Round) -> dict[str, str]:
    """Return the resolved settings that MLflow shows as params, as text, by their paths in params.yaml."""
    values: dict[str, Any] = {"model": round.params.model.model_dump()}
    if round.key != BASE:
        values |= {stage: getattr(round.params, stage).model_dump() for stage in STAGES_WITH_OVERRIDES}
        values |= {"seed": round.params.seed, "parent": round.parent}
    return {name: value[:LONGEST_PARAM] for name, value in _flat(values).items()}


def training_identity(round: Round) -> str:
    """Return a digest of a training's inputs. It is the same before and after, so that a resumed one is recognized."""
    params, lock = round.params, read_dvc_lock(round.root)
    settings = [params.seed, params.model.model_dump(), params.train.model_dump()]
    inputs = [recorded(lock, stage, "outs") for stage in (f"select@{round.key}", f"train@{round.parent}")]
    return value_digest([round.key, settings, inputs])[:16]


def curve_points(round: Round) -> list[Point]:
    """Return the round's points on the campaign's curves, with the round's depth in the tree as step (base is 0).

    Of the rounds at one depth the first in params.yaml has plain names, the others `<name>/<round>`.
    """
    if not (round.files.evaluation / "metrics.json").exists():
        return []
    tree, depth = round.params.rounds, len(round.ancestors) + (round.key != BASE)
    level = [BASE] if depth == 0 else [key for key in order(tree) if len(ancestors(tree, key)) + 1 == depth]
    suffix = "" if round.key == level[0] else f"/{round.key}"
    values = headline(round.params, read_metrics(round.files))
    return [(f"{name}{suffix}", value, depth) for name, value in values.items()]


def headline(params: Params, metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers to look at first: those of `headline_names` that there are, and after votes what people say.

    These are the win rate by people, the number of votes, Krippendorff's alpha, and each reward's agreement with them.
    """
    names = [*headline_names(params), "human_win_rate", "human_votes", "human_alpha"]
    names += [f"{name}_human_agreement" for name in params.rewards]
    return {name: float(metrics[name]) for name in names if metrics.get(name) is not None}


def headline_names(params: Params) -> list[str]:
    """Return the metrics of every evaluation to look at first: rewards, win rates of judges, measures of image sets."""
    rates = [f"{judge}_win_rate" for judge in params.reward_names("judge")]
    return [*params.rewards, *rates, *set_measures(params)]


def _sweep_points(round: Round) -> list[Point]:
    names = {*round.params.rewards, *set_measures(round.params), *IMAGE_STATS}
    return [
        (f"sweep/{name}", value, int(float(guidance) * GUIDANCE_STEPS + 0.5))
        for guidance, values in read_sweep(round.files).items()
        for name, value in values.items()
        if name in names
    ]


def _training_points(path: Path) -> list[Point]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(int(row.pop("step")), row) for row in csv.DictReader(file)]
    return [(f"train/{name}", float(value), step) for step, row in rows for name, value in row.items() if value]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else str(value)
    return flat
