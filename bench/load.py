"""How time and memory grow with the number of candidates: stages `score`, `select` and `report`.

    python -m bench.load [--plot docs/images/load.png] [10000 100000 1000000]

Each size is a drawn round (tests/campaign.py) with synthetic candidates, 8 a prompt, 8 x 8 pixels, scored by three
rewards that are the mean of a color: this measures what the stages do around models and images. Each stage is a
process of its own, imports included; memory is its peak resident set. `select` writes the winners.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import synthetic
from bench.measured import Usage, measured, plot_usage
from srpo.config.loader import PARAMS_FILE
from srpo.rounds import RoundFiles
from tests.support.campaign import build_campaign

KEY, PER_PROMPT = "001", 8
STAGES = ("score", "select", "report")


class Color:
    """The mean of a color, 0 (red), 1 or 2."""

    def __init__(self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.channel = int(model)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images[:, self.channel].float().mean(dim=(1, 2))


def make_project(root: Path, candidates: int) -> None:
    """A round up to its evaluation, as a small campaign has it, but for its many candidates."""
    build_campaign(root, rounds=(KEY,))
    raw = json.loads((root / PARAMS_FILE).read_text(encoding="utf-8"))
    for channel, reward in enumerate(raw["rewards"].values()):
        reward |= {"kind": "bench.load:Color", "model": str(channel)}
    (root / PARAMS_FILE).write_text(json.dumps(raw), encoding="utf-8")
    files, rng = RoundFiles(root, KEY), np.random.default_rng(0)
    for path in files.candidates.iterdir():
        path.unlink()
    images = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(997)]
    synthetic.write_candidates(files, candidates // PER_PROMPT, PER_PROMPT, images)


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[Usage]] = {stage: [] for stage in STAGES}
    load = os.getloadavg()[0]
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_project(Path(folder), size)
            for stage in STAGES:
                found[stage].append(measured(["srpo", stage, KEY], Path(folder)))
    table = Table(title=f"seconds (CPU seconds), GB at peak; load before {load:.1f}")
    for column in ("candidates", *STAGES):
        table.add_column(column, justify="right")
    for number, size in enumerate(arguments.sizes):
        cells = [found[stage][number] for stage in STAGES]
        table.add_row(f"{size:,}", *(f"{wall:.1f} ({cpu:.1f}), {memory:.2f}" for wall, cpu, memory, *_ in cells))
    Console(width=120).print(table)
    if arguments.plot:
        walls = {stage: [row.wall for row in rows] for stage, rows in found.items()}
        plot_usage(arguments.sizes, walls, found, arguments.plot, unit="seconds")


if __name__ == "__main__":
    main()
