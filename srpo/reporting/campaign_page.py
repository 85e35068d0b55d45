"""The campaign page: all evaluated rounds on one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo.config import tree
from srpo.config.loader import Params
from srpo.data.metric_keys import HUMAN
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.errors import MissingFile, UserError
from srpo.lineage.record import read_lineage
from srpo.reporting import charts, contact_sheets
from srpo.reporting.html import chart, embedded_image, numbers, render_page
from srpo.reporting.table import CAMPAIGN_PAGE, best_rows, set_measures
from srpo.rounds import BASE, RoundFiles
from srpo.storage.files import atomic_write

PROMPTS = 8  # with images


def write_campaign(params: Params, root: Path) -> Path:
    """Write `rounds/index.html` about all evaluated rounds, and return its path.

    A round needs only its evaluation's metrics.json; intervals, win rates, images and hashes are shown if their files
    are there. The same files give the same bytes.

    Raises:
        UserError: base is not evaluated, or a round's samples are damaged.
    """
    keys = [key for key in (BASE, *params.rounds) if (RoundFiles(root, key).evaluation / "metrics.json").exists()]
    if BASE not in keys:
        raise UserError("rounds/: no round is evaluated yet; `make demo` or `dvc repro` runs them")
    paths = tree.branches(params.rounds, keys)
    shown = [key for number, path in enumerate(paths) for key in path[bool(number) :]]
    measured = {key: _numbers(root, key) for key in shown}
    lineages = {key: _optional(read_lineage, RoundFiles(root, key)) or {} for key in shown}
    page = render_page(
        "campaign.html",
        name=params.tracking.campaign,
        rows=[
            measured[key]
            | {"parent": params.rounds[key].parent if key != BASE else "-", "depth": depth}
            | {"report": f"{key}/report/index.html" if (RoundFiles(root, key).report / "index.html").exists() else None}
            for key, depth in _depths(paths).items()
        ],
        waiting=[key for key in tree.order(params.rounds) if key not in keys],
        base=lineages[BASE].get("base"),
        selects=params.reward_names("select"),
        judges=params.reward_names("judge"),
        names=[*params.rewards, *set_measures(params), *_of_people(measured)],
        best=best_rows(root, params),
        people=_people(root, shown),
        charts=_charts(params, root, measured, paths),
        strip=_strip(root, shown),
        lineages=lineages,
    )  # fmt: skip
    out = root / CAMPAIGN_PAGE
    with atomic_write(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def _of_people(measured: Mapping[str, Mapping]) -> list[str]:
    """Return the columns about people, which are there once somebody voted on a round."""
    return [name for name in ("human_win_rate",) if any(name in numbers for numbers in measured.values())]


def _people(root: Path, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by round with votes what its gate.json says about people."""
    gates = {key: _optional(read_gate, RoundFiles(root, key)) or {} for key in keys}
    return {key: gate[HUMAN] for key, gate in gates.items() if gate.get(HUMAN)}


def _optional(read: Callable[[RoundFiles], Any], files: RoundFiles) -> Any:
    """Return the result of `read`, or None if its file is missing: the page shows what is checked out."""
    try:
        return read(files)
    except MissingFile:
        return None


def _numbers(root: Path, key: str) -> dict[str, Any]:
    return numbers(key, read_metrics(RoundFiles(root, key)), _optional(read_sweep, RoundFiles(root, key)) or {})


def _depths(paths: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return by round the number of forks between it and the trunk."""
    depths = dict.fromkeys(paths[0], 0)
    for path in paths[1:]:
        depths |= dict.fromkeys(path[1:], depths[path[0]] + 1)
    return depths


def _charts(
    params: Params, root: Path, measured: Mapping[str, Mapping], paths: Sequence[Sequence[str]]
) -> dict[str, list[tuple[str, str]]]:
    """Return by section [(name, SVG data URI)]."""
    roles = {name: spec.role for name, spec in params.rewards.items()}
    rates = {key: _win_rates(root, key, roles) for key in measured}
    whole = []
    for path in paths:
        above = [BASE, *tree.ancestors(params.rounds, path[-1])] if path[-1] != BASE else []
        whole.append([key for key in (*above, path[-1]) if key in measured])
    sections = {role: [name for name in roles if roles[name] == role] for role in ("select", "judge")}
    sections["measure"] = list(set_measures(params))
    drawn = {
        role: [(name, chart(charts.over_rounds(measured, paths, name, role))) for name in names]
        for role, names in sections.items()
    }
    people = {HUMAN: HUMAN} if any(HUMAN in values for key, values in rates.items() if key != BASE) else {}
    drawn["win_rates"] = [
        (f"base to {path[-1]}", chart(charts.win_rates(rates, path, roles | people))) for path in whole
    ]
    return drawn


def _win_rates(root: Path, key: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return win rates over base with intervals, by reward and people; 0.5 for base itself.

    Rewards compare each model at its own best guidance, people at the reported one.
    """
    if key == BASE:
        return dict.fromkeys((*names, HUMAN), 0.5)
    gate = _optional(read_gate, RoundFiles(root, key)) or {}
    rates = {name: rate["best"] for name, rate in gate.get("win_rate", {}).items()}
    if gate.get(HUMAN):
        rates[HUMAN] = gate[HUMAN]["win_rate"]
    return {name: rate["value"] for name, rate in rates.items()} | {
        f"{name}_{end}": rate[end] for name, rate in rates.items() for end in ("low", "high")
    }


def _strip(root: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return held-out prompts, each with one image per round from the same noise, None where samples are missing."""
    sampled = [key for key in keys if (RoundFiles(root, key).evaluation / "samples.parquet").exists()]
    prompts = contact_sheets.held_out(root, sampled, PROMPTS) if sampled else []
    return [
        {"prompt": prompt, "cells": [(key, embedded_image(images[key]) if key in images else None) for key in keys]}
        for prompt, images in prompts
    ]
