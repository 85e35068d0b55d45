"""Selecting winners: the stage `select` against what a user would otherwise write in pandas, at scale.

    python -m bench.select [--candidates 10000000] [--per-prompt 8]

Makes scores and candidate shards in the project's own schema, with two selecting rewards. Images are 1 x 1
pixel and latents 16 numbers: this measures tables, not disks full of images. Three child processes run on them one
after another: `srpo select`, whole; its choice alone, which reads scores and no candidates; and pandas (`groupby`,
`transform`, `idxmax`) for that same choice. Memory is each child's peak resident set; CPU seconds say more
than seconds on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from bench import synthetic
from bench.measured import PROJECT, measured
from srpo.config.loader import PARAMS_FILE
from srpo.config.schema import SelectParams
from srpo.data.scores import read_scores
from srpo.rounds import RoundFiles
from srpo.selection.best_of_n import choose_winners

KEY = "001"
WEIGHTS = {"first": 1.0, "second": 0.5}


def make_project(root: Path, candidates: int, per_prompt: int) -> int:
    """Write params.yaml, scores and candidates under `root`, a shard at a time; returns the number of prompts."""
    raw = YAML(typ="safe").load((PROJECT / PARAMS_FILE).read_text(encoding="utf-8"))
    role = {"kind": "clip", "model": "none", "role": "select"}
    raw["rewards"] = {name: role | {"weight": weight} for name, weight in WEIGHTS.items()}
    raw["rewards"]["judge"] = role | {"role": "judge"}
    raw["evaluate"]["features"] = "judge"
    (root / PARAMS_FILE).write_text(json.dumps(raw), encoding="utf-8")
    files, prompts = RoundFiles(root, KEY), candidates // per_prompt
    synthetic.write_candidates(files, prompts, per_prompt, [np.zeros((1, 1, 3), np.uint8)])
    synthetic.write_scores(files, prompts, per_prompt, [*WEIGHTS, "judge"])
    return prompts


def by_srpo(root: Path) -> pl.Series:
    """The choice alone: the winners' candidate_id in prompt order."""
    scores = read_scores(RoundFiles(root, KEY).scores, dict.fromkeys(WEIGHTS, "select")).filter(~pl.col("invalid"))
    return choose_winners(scores, WEIGHTS, SelectParams())["candidate_id"]


def by_pandas(root: Path) -> pl.Series:
    """The same with pandas, as one would write it."""

    scores = read_scores(RoundFiles(root, KEY).scores, dict.fromkeys(WEIGHTS, "select")).to_pandas()
    scores = scores[~scores["invalid"] & np.isfinite(scores[list(WEIGHTS)]).all(axis=1)]
    scores["selection_score"] = 0.0
    for name, weight in WEIGHTS.items():
        values = scores.groupby("prompt_id")[name]
        z = (scores[name] - values.transform("mean")) / values.transform("std", ddof=0)
        scores["selection_score"] += weight * z.fillna(0.0)
    best = scores.loc[scores.groupby("prompt_id")["selection_score"].idxmax()]
    return pl.Series("candidate_id", best["candidate_id"].to_numpy())


WAYS = {"choose": by_srpo, "pandas": by_pandas}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--candidates", type=int, default=10_000_000)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a child
    arguments = parser.parse_args()
    if arguments.way:
        WAYS[arguments.way](Path.cwd()).to_frame().write_parquet(f"{arguments.way}.parquet")
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = time.perf_counter()
        prompts = make_project(root, arguments.candidates, arguments.per_prompt)
        print(f"made {arguments.candidates} candidates in {time.perf_counter() - start:.0f} s", flush=True)
        load = os.getloadavg()[0]
        found = {
            "srpo select, winners written": measured(["srpo", "select", KEY], root),
            "its choice alone": measured(["bench.select", "--way", "choose"], root),
            "the choice in pandas": measured(["bench.select", "--way", "pandas"], root),
        }
        ours, other = (pl.read_parquet(root / f"{way}.parquet") for way in WAYS)
        same = (ours["candidate_id"] == other["candidate_id"]).mean()
    theirs = found["the choice in pandas"]
    table = Table(title=f"{arguments.candidates} candidates of {prompts} prompts; load before {load:.1f}")
    for column in ("way", "seconds", "CPU seconds", "GB at peak", "pandas' seconds over these", "CPU"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, (wall, cpu, memory, *_) in found.items():
        ratios = f"{theirs[0] / wall:.2f}", f"{theirs[1] / cpu:.2f}"
        table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{memory:.2f}", *ratios)
    Console(width=120).print(table)
    print(f"the same winner for {same:.4%} of prompts")


if __name__ == "__main__":
    main()
