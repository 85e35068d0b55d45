"""What bench.methods found, as a table and as a plot."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from srpo.rounds import BASE

MEASURES = ("accuracy", "accuracy_best", "judge_win_rate_low", "fid_ratio", "diversity_ratio", "passed")


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
    """Draw variety against accuracy, a line an arm from base over its rounds; `shipped` arms are params.yaml.

    Points are means over seeds, and bars the range of seeds after the last round.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = read(runs)
    arms = arms or frame["arm"].unique(maintain_order=True).to_list()
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for arm in arms:
        rows = frame.filter(pl.col("arm") == arm).sort("round")
        means = rows.group_by("round", maintain_order=True).agg(pl.col(MEASURES).mean())
        last = rows.filter(pl.col("round") == rows["round"].max())
        x, y = last["diversity_ratio"], last["accuracy_best"]
        chosen = arm in shipped
        (line,) = axis.plot(
            means["diversity_ratio"], means["accuracy_best"], marker="o", markersize=4, zorder=3 if chosen else 2,
            linewidth=2.4 if chosen else 1.2, label=f"{arm}, as in params.yaml" if chosen else arm,
        )  # fmt: skip
        axis.errorbar(
            x.mean(), y.mean(), fmt="none", color=line.get_color(), alpha=0.6,
            xerr=[[x.mean() - x.min()], [x.max() - x.mean()]], yerr=[[y.mean() - y.min()], [y.max() - y.mean()]],
        )  # fmt: skip
    axis.axvline(0.9, color="gray", linestyle=":", label="least that the gate accepts")
    axis.set(xlabel="variety of what prompts leave open, as a share of base's", ylabel="accuracy at its best guidance")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
