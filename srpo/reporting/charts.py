"""Charts of the pages as SVG text. The same numbers give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLORS = {"base": "#8a9099", "parent": "#3b82c4", "round": "#d9480f"}
ROLES = {"select": "#d9480f", "judge": "#3b82c4", "measure": "#5c636d", "human": "#191b1f"}
JUDGES = ("#3b82c4", "#2b8a3e", "#7048e8", "#0b7285")
STROKES = ("-", "--", ":", "-.")  # one per branch
WIDE, SMALL = (3.3, 2.7), (2.3, 2.0)  # inches
Measured = Mapping[str, Mapping[str, Any]]
"""Numbers, or None, by round or guidance, then by name; `<name>_low` and `<name>_high` are the interval of `<name>`."""


def over_rounds(measured: Measured, paths: Sequence[Sequence[str]], name: str, role: str = "measure") -> str:
    """Draw a measure and its intervals over the rounds: one line per path, in the color of `role` (a key of ROLES).

    Args:
        measured: by round; a round without the number is left out.
        paths: `config.tree.branches`; a path after the first starts at the round where it branches off.
    """
    figure, axis = _axis(SMALL)
    places = _places(paths)
    for number, path in enumerate(paths):
        values = {key: measured[key] for key in path if _known(measured[key].get(name))}
        if not values:
            continue
        xs = [places[key] for key in values]
        _line(axis, xs, list(values.values()), name, color=ROLES[role], linestyle=STROKES[number % len(STROKES)])
        if len(paths) > 1:
            end = (xs[-1], values[list(values)[-1]][name])
            axis.annotate(path[-1], end, xytext=(5, 0), textcoords="offset points", fontsize=8, va="center")
    _name_rounds(axis, places)
    axis.set_title(name, fontsize=10)
    return _svg(figure)


def win_rates(measured: Measured, path: Sequence[str], roles: Mapping[str, str]) -> str:
    """Draw every win rate over base along one path, on one scale.

    Args:
        roles: by reward, `select` or `judge`; `human` for people's.
    """
    figure, axis = _axis(WIDE)
    shades = iter(JUDGES * len(roles))
    for name, role in roles.items():
        known = [(place, measured[key]) for place, key in enumerate(path) if _known(measured[key].get(name))]
        style = {"color": next(shades)} if role == "judge" else {"color": ROLES[role], "linewidth": 2.4}
        label = f"{name} (selects)" if role == "select" else "people" if role == "human" else name
        _line(axis, [place for place, _ in known], [row for _, row in known], name, label=label, **style)
    axis.axhline(0.5, color=COLORS["base"], linewidth=1, linestyle="--")
    axis.set_ylim(-0.02, 1.02)
    _name_rounds(axis, {key: place for place, key in enumerate(path)})
    axis.set_title(f"base to {path[-1]}", fontsize=10)
    return _legend(figure)


def sweep(sweeps: Mapping[str, Measured], name: str) -> str:
    """Draw a measure and its interval against guidance: one line per entry of `sweeps` (label -> by guidance)."""
    figure, axis = _axis(WIDE)
    palette = dict(zip(sweeps, [COLORS["base"], COLORS["parent"], COLORS["round"]][-len(sweeps) :], strict=True))
    for label, measured in sweeps.items():
        guidance = sorted(measured, key=float)
        rows = [measured[g] for g in guidance]
        xs = [float(g) for g in guidance]
        axis.plot(xs, [row[name] for row in rows], "o-", markersize=4, label=label, color=palette[label])
        if f"{name}_low" in rows[0]:
            low, high = ([row[f"{name}_{side}"] for row in rows] for side in ("low", "high"))
            axis.fill_between(xs, low, high, color=palette[label], alpha=0.15, linewidth=0)
    axis.set_title(name.replace("_", " "), fontsize=10)
    axis.set_xlabel("guidance", fontsize=9)
    return _legend(figure)


def histograms(name: str, candidates: np.ndarray, winners: np.ndarray) -> str:
    """Draw the distributions of a reward over all candidates and over the winners, each as shares."""
    figure, axis = _axis(WIDE)
    edges = np.histogram_bin_edges(candidates[np.isfinite(candidates)], bins=24)
    for label, part, color in (("candidates", candidates, "base"), ("winners", winners, "round")):
        share = np.ones(len(part)) / max(1, len(part))
        axis.hist(part, edges.tolist(), weights=share, alpha=0.6, label=label, color=COLORS[color])
    axis.set_title(name, fontsize=10)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _legend(figure)


def training(steps: Sequence[int], loss: Sequence[float]) -> str:
    """Draw the loss of every step, and its running mean."""
    figure, axis = _axis(WIDE)
    axis.plot(steps, loss, color=COLORS["base"], alpha=0.5, linewidth=0.8, label="each step")
    window = max(1, len(loss) // 15)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color=COLORS["round"], label=f"mean of {window}")
    axis.set_title("training loss", fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    return _legend(figure)


def _axis(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8.5)
    axis.margins(x=0.08)
    return figure, axis


def _line(axis: Axes, xs: Sequence[float], rows: Sequence[Mapping], name: str, **style: Any) -> None:
    """Draw a line with error bars where a row has an interval."""
    values = np.array([row[name] for row in rows], float)
    # a bootstrap interval may not contain the mean; an error bar can't be negative
    below, above = (
        [max(0.0, sign * (row.get(f"{name}_{side}", row[name]) - row[name])) for row in rows]
        for side, sign in (("low", -1), ("high", 1))
    )
    bars = axis.errorbar(xs, values, yerr=[below, above], fmt="o", capsize=2.5, markersize=4.5, elinewidth=1, **style)
    bars[0].set_linestyle(style.get("linestyle", "-"))


def _places(paths: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return by round its position on the x axis: the number of measured rounds above it."""
    places: dict[str, int] = {}
    for path in paths:
        start = places.get(path[0], 0)
        places |= {key: start + i for i, key in enumerate(path)}
    return places


def _name_rounds(axis: Axes, places: Mapping[str, int]) -> None:
    ticks = sorted(set(places.values()))
    names = ["\n".join(key for key, place in places.items() if place == tick) for tick in ticks]
    crowded = sum(max(map(len, name.split("\n"))) for name in names) > 24
    axis.set_xticks(ticks, names, rotation=60 if crowded else 0)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _legend(figure: Figure) -> str:
    # below the axes, where it hides no line
    labels = figure.axes[0].get_legend_handles_labels()[1]
    columns = min(3, len(labels)) if sum(map(len, labels)) <= 32 else 1
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, columnspacing=1.2, handlelength=1.5
    )
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "srpo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
