"""The stages around the models at SDXL's true sizes: time, memory and traffic per candidate.

    python -m bench.true_size [--prompts 40 400 4000] [--per-prompt 8] [--plot docs/images/true_size.png]

Makes a round of synthetic candidates with images of 1024 x 1024 pixels and latents of 65,536 numbers, and runs on it,
each as a process of its own, imports included: `srpo score` with rewards that cost nothing, `srpo select`, the reading
of winners in the random order of training, image statistics as in evaluation, `srpo report`, and `dvc add` with hard
links. The round holds 16 different images in turn.

"Least CPU" is what a stage can't do without: reading and writing its bytes (page cache warm), decoding its images and
hashing what DVC adds, each at the cost measured on one core just before. CPU seconds say more than seconds on a machine
that others use, too; decoding uses all cores, so seconds can be fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import synthetic
from bench.measured import Usage, measured, plot_usage
from srpo.config.loader import PARAMS_FILE
from srpo.data import parquet
from srpo.data.images import encode_images
from srpo.data.parquet import RowReader
from srpo.rounds import RoundFiles
from srpo.storage.hashing import dvc_digest
from tests.support.campaign import build_campaign

if TYPE_CHECKING:
    import torch

KEY = "001"
SIDE = 1024
LATENTS = (4, SIDE // 8, SIDE // 8)
LATENT_MB = 2 * 4 * (SIDE // 8) ** 2 / 1e6
IMAGES = 16
PROMPTS_PER_SHARD = 28
BATCH = 16
PAIR = ("latents", "loser_latents")
COMPARED = 24  # images of winners and losers in a report
DVC_CONFIG = "[core]\n    no_scm = True\n    analytics = False\n[cache]\n    type = hardlink\n"


class FirstRow:
    """The mean of a color in the first row: a reward that costs nothing."""

    def __init__(self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.channel = int(model)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images[:, self.channel, 0].float().mean(dim=1)


class Costs(NamedTuple):
    """CPU seconds on one core: to read, write or hash one MB, and to decode one image."""

    read: float
    write: float
    md5: float
    decode: float


def photo_like(seed: int) -> np.ndarray:
    """Return uint8 [SIDE, SIDE, 3] with the spectrum of a photograph (amplitude falls with frequency), and grain."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1
    shared, *channels = (
        np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency**1.5).real for _ in range(4)
    )
    layers = [shared + 0.2 * channel for channel in channels]
    pixels = np.stack([128 + 45 * (layer - layer.mean()) / layer.std() for layer in layers], axis=-1)
    return np.clip(pixels + rng.normal(0, 0.8, pixels.shape), 0, 255).astype(np.uint8)


def make_project(root: Path, prompts: int, per_prompt: int) -> float:
    """Write a small campaign whose round 001 has these candidates; return MB per image."""
    build_campaign(root, rounds=(KEY,))
    raw = json.loads((root / PARAMS_FILE).read_text(encoding="utf-8"))
    for channel, reward in enumerate(raw["rewards"].values()):
        reward |= {"kind": "bench.true_size:FirstRow", "model": str(channel)}
    (root / PARAMS_FILE).write_text(json.dumps(raw), encoding="utf-8")
    files = RoundFiles(root, KEY)
    shutil.rmtree(files.candidates)
    images = [photo_like(seed) for seed in range(IMAGES)]
    synthetic.write_candidates(files, prompts, per_prompt, images, LATENTS, PROMPTS_PER_SHARD)
    return sum(len(cell["bytes"]) for cell in encode_images(images)) / IMAGES / 1e6


def paired_rows(reader: RowReader) -> np.ndarray:
    """Return the numbers of the winners that have a loser, int64 [n]."""
    return np.flatnonzero(reader.has("loser_latents"))


def read_pairs(reader: RowReader, order: np.ndarray, batch_size: int = BATCH) -> None:
    """Read the latents of these winners and of their losers, a batch at a time."""
    for start in range(0, len(order), batch_size):
        for column in PAIR:
            reader.latents(order[start : start + batch_size], column)


def read_winners() -> None:
    """Read every winner's latents and its loser's in random order, as training does."""
    reader = RowReader(RoundFiles(Path.cwd(), KEY).winners)
    read_pairs(reader, np.random.default_rng(0).permutation(paired_rows(reader)))


def measure_images() -> None:
    """Decode all candidates and compute their image statistics, as evaluation does."""
    from srpo.data.decoding import decode_images  # these two import torch, which the reading of winners does not need
    from srpo.evaluation.image_stats import image_stats

    for batch in parquet.read_batches(RoundFiles(Path.cwd(), KEY).candidates, ["image"]):
        image_stats(decode_images(batch["image"].to_pylist()).transpose(0, 3, 1, 2))


PARTS: dict[str, Callable[[], None]] = {"read": read_winners, "metrics": measure_images}


def measure_costs(root: Path) -> Costs:
    """Measure with 64 MB and 8 images."""
    from srpo.data.decoding import decode_images

    size = 64
    data = np.random.default_rng(0).bytes(size * 10**6)
    file = root / "speed"

    def write() -> None:
        with file.open("wb") as out:
            out.write(data)
            os.fsync(out.fileno())

    write_cost = _cpu_seconds(write) / size
    read_cost = _cpu_seconds(file.read_bytes) / size
    md5_cost = _cpu_seconds(lambda: dvc_digest(file)) / size
    file.unlink()
    cells = encode_images(photo_like(seed) for seed in range(8))
    return Costs(read_cost, write_cost, md5_cost, _cpu_seconds(lambda: decode_images(cells)) / len(cells))


def _cpu_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def least(images: int, prompts: int, image_mb: float, costs: Costs) -> dict[str, float]:
    """Return by stage the CPU seconds that it can't do without."""
    winner_mb = image_mb + 2 * LATENT_MB
    candidates_mb = images * (image_mb + LATENT_MB)
    winners_mb = prompts * winner_mb
    return {
        "score": candidates_mb * costs.read + images * costs.decode,
        "select": winners_mb * (costs.read + costs.write),
        "read": 2 * prompts * LATENT_MB * costs.read,
        "metrics": images * (image_mb * costs.read + costs.decode),
        "report": COMPARED * (image_mb * costs.read + costs.decode),
        "dvc": (candidates_mb + winners_mb) * (costs.read + costs.md5),
    }


def measure(prompts: int, per_prompt: int) -> dict[str, Usage]:
    """Measure every stage, print the table, and return what each used."""
    images = prompts * per_prompt
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        image_mb = make_project(root, prompts, per_prompt)
        costs = measure_costs(root)
        used: dict[str, Usage] = {"score": measured(["srpo", "score", KEY], root)}
        used["select"] = measured(["srpo", "select", KEY], root)
        for part in PARTS:
            used[part] = measured(["bench.true_size", "--part", part], root)
        used["report"] = measured(["srpo", "report", KEY], root)
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text(DVC_CONFIG)
        used["dvc"] = measured(
            ["dvc", "add", "--quiet", *(f"rounds/{KEY}/{n}" for n in ("candidates", "winners"))], root
        )
        floor = least(images, prompts, image_mb, costs)
    table = Table(
        title=f"{images} candidates of {prompts} prompts, {image_mb:.2f} MB per image; load {os.getloadavg()[0]:.1f}"
    )
    for column in (
        *("stage", "seconds", "CPU seconds", "GB at peak", "ms per candidate", "CPU ms", "least CPU ms"),
        *("MB read per candidate", "MB written"),
    ):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, usage in used.items():
        table.add_row(
            *(stage, f"{usage.wall:.1f}", f"{usage.cpu:.1f}", f"{usage.memory:.2f}"),
            *(f"{1e3 * seconds / images:.2f}" for seconds in (usage.wall, usage.cpu, floor[stage])),
            *(f"{mb / images:.2f}" for mb in (usage.read, usage.written)),
        )
    Console(width=140).print(table)
    print(
        f"CPU ms: {1e3 * costs.read:.2f} to read, {1e3 * costs.write:.2f} to write, {1e3 * costs.md5:.2f} to hash a MB;"
        f" {1e3 * costs.decode:.0f} to decode an image; {len(os.sched_getaffinity(0))} cores",
        flush=True,
    )
    return used


def main() -> None:
    """Print a table for each number of prompts, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[40])
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of a child process
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part]()
        return
    runs = [measure(prompts, arguments.per_prompt) for prompts in arguments.prompts]
    if arguments.plot:
        candidates = [prompts * arguments.per_prompt for prompts in arguments.prompts]
        found = {stage: [used[stage] for used in runs] for stage in runs[0]}
        times = {
            stage: [1e3 * row.cpu / count for row, count in zip(rows, candidates, strict=True)]
            for stage, rows in found.items()
        }
        plot_usage(candidates, times, found, arguments.plot, unit="CPU ms per candidate")


if __name__ == "__main__":
    main()
