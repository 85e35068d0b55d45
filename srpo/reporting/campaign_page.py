"""The campaign page: all evaluated rounds on one self-contained page. No torch in here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo.config import tree
from srpo.config.loader import Params
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.errors import MissingFile, UserError
from srpo.lineage.record import read_lineage
from srpo.reporting import charts, contact_sheets
from srpo.reporting.html import chart, numbers, picture, render_page
from srpo.reporting.table import CAMPAIGN_PAGE, SET_MEASURES
from srpo.rounds import BASE, RoundFiles
from srpo.storage.scratch import scratch_folder

PROMPTS = 8  # in the strip of pictures


def write_campaign(params: Params, root: Path) -> Path:
    """Write `rounds/index.html` over whatever rounds are evaluated, and return its path.

    Of a round only the evaluation's metrics.json is needed; intervals, win rates, pictures and hashes are shown
    where their files are. The same files give the same bytes; the page is replaced whole or not at all.

    Raises:
        UserError: base is not evaluated, without which no round can be; or a round's samples are damaged.
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
        names=[*params.rewards, *SET_MEASURES],
        charts=_charts(params, root, measured, paths),
        strip=_strip(root, shown),
        lineages=lineages,
    )  # fmt: skip
    out = root / CAMPAIGN_PAGE
    partial = scratch_folder(root, "campaign", "page", "redone") / f"{os.getpid()}.html"  # two flows may end at once
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def _optional(read: Callable[[RoundFiles], Any], files: RoundFiles) -> Any:
    """What `read` finds, or None: the page shows whatever is checked out."""
    try:
        return read(files)
    except MissingFile:
        return None


def _numbers(root: Path, key: str) -> dict[str, Any]:
    return numbers(key, read_metrics(RoundFiles(root, key)), _optional(read_sweep, RoundFiles(root, key)) or {})


def _depths(paths: Sequence[Sequence[str]]) -> dict[str, int]:
    """By round, how many branchings lie between it and the trunk."""
    depths = dict.fromkeys(paths[0], 0)
    for path in paths[1:]:
        depths |= dict.fromkeys(path[1:], depths[path[0]] + 1)
    return depths


def _charts(
    params: Params, root: Path, measured: Mapping[str, Mapping], paths: Sequence[Sequence[str]]
) -> dict[str, list[tuple[str, str]]]:
    """By section, (name, SVG data URI)."""
    roles = {name: spec.role for name, spec in params.rewards.items()}
    rates, whole = {key: _win_rates(root, key, roles) for key in measured}, []
    for path in paths:
        above = [BASE, *tree.ancestors(params.rounds, path[-1])] if path[-1] != BASE else []
        whole.append([key for key in (*above, path[-1]) if key in measured])
    sections = {role: [name for name in roles if roles[name] == role] for role in ("select", "judge")}
    sections["measure"] = list(SET_MEASURES)
    drawn = {
        role: [(name, chart(charts.over_rounds(measured, paths, name, role))) for name in names]
        for role, names in sections.items()
    }
    drawn["win_rates"] = [(f"base to {path[-1]}", chart(charts.win_rates(rates, path, roles))) for path in whole]
    return drawn


def _win_rates(root: Path, key: str, names: Mapping[str, str]) -> dict[str, float]:
    """Win rates over base, each model at its own best guidance, with their intervals; base is even with itself."""
    if key == BASE:
        return dict.fromkeys(names, 0.5)
    found = (_optional(read_gate, RoundFiles(root, key)) or {}).get("win_rate", {})
    rates = {name: rate["best"] for name, rate in found.items()}
    return {name: rate["value"] for name, rate in rates.items()} | {
        f"{name}_{end}": rate[end] for name, rate in rates.items() for end in ("low", "high")
    }


def _strip(root: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """By held-out prompt: its text, and by round a picture from the same noise, None where samples are missing."""
    there = [key for key in keys if (RoundFiles(root, key).evaluation / "samples.parquet").exists()]
    found = contact_sheets.held_out(root, there, PROMPTS) if there else []
    return [
        {"prompt": prompt, "cells": [(key, picture(images[key]) if key in images else None) for key in keys]}
        for prompt, images in found
    ]
