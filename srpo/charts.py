"""The report's charts, as SVG text. The same numbers give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

COLOURS = {"base": "#8a9099", "parent": "#3b82c4", "round": "#d9480f"}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "srpo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(count: int, height: float = 2.6) -> tuple[Figure, list]:
    figure = Figure(figsize=(3.3 * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def over_rounds(rows: Sequence[Mapping], names: Sequence[str]) -> str:
    """One small chart per name, its value against the rounds in the given order."""
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        points = [(row["round"], row[name]) for row in rows if row.get(name) is not None]
        axis.plot([key for key, _ in points], [value for _, value in points], "o-", color=COLOURS["round"])
        axis.set_title(name, fontsize=10)
    return _svg(figure)


def sweep(sweeps: Mapping[str, Mapping], names: Sequence[str]) -> str:
    """One chart per name: its value against guidance, a line per entry of `sweeps` (label -> metrics' sweep)."""
    figure, axes = _axes(len(names))
    palette = dict(zip(sweeps, [COLOURS["base"], COLOURS["parent"], COLOURS["round"]][-len(sweeps) :], strict=True))
    for axis, name in zip(axes, names, strict=True):
        for label, values in sweeps.items():
            guidance = sorted(values, key=float)
            heights = [values[g][name] for g in guidance]
            axis.plot([float(g) for g in guidance], heights, "o-", label=label, color=palette[label])
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("guidance", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def histograms(candidates: Mapping[str, np.ndarray], winners: Mapping[str, np.ndarray]) -> str:
    """One chart per reward: all candidates and the winners, each as a share of its own number."""
    figure, axes = _axes(len(candidates))
    for axis, (name, values) in zip(axes, candidates.items(), strict=True):
        edges = np.histogram_bin_edges(values[np.isfinite(values)], bins=24)
        for label, part, colour in (("candidates", values, "base"), ("winners", winners[name], "round")):
            share = np.ones(len(part)) / max(1, len(part))
            axis.hist(part, edges, weights=share, alpha=0.6, label=label, color=COLOURS[colour])
        axis.set_title(name, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def training(steps: Sequence[int], loss: Sequence[float]) -> str:
    """The loss of every step, and its running mean."""
    figure, (axis,) = _axes(1)
    axis.plot(steps, loss, color=COLOURS["base"], alpha=0.5, linewidth=0.8)
    window = max(1, len(loss) // 15)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axis.plot(steps[window - 1 :], smooth, color=COLOURS["round"])
    axis.set_title("training loss", fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    return _svg(figure)
