"""What bench.methods found, as a table and as a plot."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from srpo.rounds import BASE

MEASURES = ("accuracy", "best_accuracy", "judge", "fid", "diversity_right")


def read(runs: Path) -> pl.DataFrame:
    """One row per arm, seed and round: the measures. Base is round 0 of every arm."""
    base = json.loads((runs / BASE / "rounds" / BASE / "methods.json").read_text())
    rows = []
    for root in sorted(runs.glob("*-[0-9]*")):
        arm, seed = root.name.rsplit("-", 1)
        known = {"arm": arm, "seed": int(seed)}
        rows.append(known | {"round": 0} | {name: base[name] for name in MEASURES})
        for path in sorted(root.glob("rounds/[0-9]*/methods.json")):
            found = json.loads(path.read_text())
            rows.append(known | {"round": int(path.parent.name)} | {name: found[name] for name in MEASURES})
    return pl.DataFrame(rows)


def show(runs: Path) -> None:
    """Print mean and range over seeds of every arm's rounds."""
    table, frame = Table(title=f"{runs}: mean (lowest to highest) over seeds"), read(runs)
    for column in ("arm", "round", "seeds", *MEASURES):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for (arm, number), rows in frame.group_by(["arm", "round"], maintain_order=True):
        spread = [
            f"{rows[name].mean():.3f}"
            + (f" ({rows[name].min():.3f}-{rows[name].max():.3f})" if rows.height > 1 and number else "")
            for name in MEASURES
        ]
        table.add_row(arm if number == 0 else "", str(number), str(rows.height), *spread)
    Console(width=160).print(table)


def plot(runs: Path, path: Path, arms: list[str], shipped: set[str]) -> None:
    """Accuracy and FID over rounds, a line an arm, the range over seeds shaded; `shipped` arms are params.yaml."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = read(runs)
    arms = arms or frame["arm"].unique(maintain_order=True).to_list()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, measure, label in zip(
        axes, ("accuracy", "fid"), ("accuracy on held-out prompts", "FID (lower is better)"), strict=True
    ):
        for arm in arms:
            label = f"{arm}, as in params.yaml" if arm in shipped else arm
            rows = frame.filter(pl.col("arm") == arm).group_by("round").agg(
                pl.col(measure).mean().alias("mean"), pl.col(measure).min().alias("low"),
                pl.col(measure).max().alias("high"),
            ).sort("round")  # fmt: skip
            (line,) = axis.plot(rows["round"], rows["mean"], marker="o", markersize=4, label=label)
            axis.fill_between(rows["round"], rows["low"], rows["high"], alpha=0.12, color=line.get_color(), lw=0)
        axis.set(xlabel="round", ylabel=label, xticks=sorted(frame["round"].unique()))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
