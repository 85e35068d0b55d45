"""The stages around the models at SDXL's true sizes: time, memory and traffic per candidate.

    python -m bench.true_size [--prompts 40] [--per-prompt 8]

Makes a round of synthetic candidates with images of 1024 x 1024 pixels and latents of 65,536 numbers, and runs on it,
each as a process of its own, imports included: `srpo score` with rewards that cost nothing, `srpo select`, the reading
of winners in the random order of training, image statistics as in evaluation, `srpo report`, and `dvc add` with hard
links. The round holds 16 different images in turn.

"Least" is what a stage can't do without: its bytes at the speed of this disk (page cache warm), its images at this
machine's decoding speed on all cores, and its hashes at md5's speed. CPU seconds say more than seconds on a machine
that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import synthetic
from bench.measured import Usage, measured
from srpo.config.loader import PARAMS_FILE
from srpo.data import parquet
from srpo.data.images import decode_images, encode_images
from srpo.data.parquet import RowReader
from srpo.evaluation.image_stats import image_stats
from srpo.rounds import RoundFiles
from srpo.storage.hashing import dvc_digest
from tests.support.campaign import build_campaign

KEY = "001"
SIDE = 1024
LATENTS = (4, SIDE // 8, SIDE // 8)
LATENT_MB = 2 * 4 * (SIDE // 8) ** 2 / 1e6
IMAGES = 16
PROMPTS_PER_SHARD = 28
BATCH = 16
DVC_CONFIG = "[core]\n    no_scm = True\n    analytics = False\n[cache]\n    type = hardlink\n"


class Speeds(NamedTuple):
    """What this machine does at best: MB/s of reading, writing and md5, and decoded images per second on all cores."""

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
        reward |= {"kind": "bench.load:Colour", "model": str(channel)}
    (root / PARAMS_FILE).write_text(json.dumps(raw), encoding="utf-8")
    files = RoundFiles(root, KEY)
    shutil.rmtree(files.candidates)
    images = [photo_like(seed) for seed in range(IMAGES)]
    synthetic.write_candidates(files, prompts, per_prompt, images, LATENTS, PROMPTS_PER_SHARD)
    return sum(len(cell["bytes"]) for cell in encode_images(images)) / IMAGES / 1e6


def read_winners() -> None:
    """Read every winner's latents and its loser's in random order, as training does."""
    reader = RowReader(RoundFiles(Path.cwd(), KEY).winners)
    paired = np.flatnonzero(reader.has("loser_latents"))
    order = np.random.default_rng(0).permutation(paired)
    for start in range(0, len(order), BATCH):
        for column in ("latents", "loser_latents"):
            reader.latents(order[start : start + BATCH], column)


def measure_images() -> None:
    """Decode all candidates and compute their image statistics, as evaluation does."""
    for batch in parquet.read_batches(RoundFiles(Path.cwd(), KEY).candidates, ["image"]):
        image_stats(decode_images(batch["image"].to_pylist()).transpose(0, 3, 1, 2))


PARTS: dict[str, Callable[[], None]] = {"read": read_winners, "metrics": measure_images}


def speeds(root: Path) -> Speeds:
    """Measure what this machine does at best, with 64 MB and 32 images."""
    data = np.random.default_rng(0).bytes(64 << 20)
    file = root / "speed"

    def write() -> None:
        with file.open("wb") as out:
            out.write(data)
            os.fsync(out.fileno())

    write_speed = 67.1 / _seconds(write)
    read_speed = 67.1 / _seconds(file.read_bytes)
    md5 = 67.1 / _seconds(lambda: dvc_digest(file))
    file.unlink()
    cells = encode_images([photo_like(seed) for seed in range(4)]) * 8
    return Speeds(read_speed, write_speed, md5, len(cells) / _seconds(lambda: decode_images(cells)))


def _seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def least(images: int, prompts: int, image_mb: float, best: Speeds) -> dict[str, float]:
    """Return by stage the seconds that it can't do without."""
    winner_mb = image_mb + 2 * LATENT_MB
    candidates_mb = images * (image_mb + LATENT_MB)
    winners_mb = prompts * winner_mb
    return {
        "score": candidates_mb / best.read + images / best.decode,
        "select": winners_mb / best.read + winners_mb / best.write,
        "read": 2 * prompts * LATENT_MB / best.read,
        "metrics": images * image_mb / best.read + images / best.decode,
        "report": 24 * image_mb / best.read + 24 / best.decode,
        "dvc": (candidates_mb + winners_mb) / best.md5,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of a child process
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part]()
        return
    images = arguments.prompts * arguments.per_prompt
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        image_mb = make_project(root, arguments.prompts, arguments.per_prompt)
        best = speeds(root)
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
        floor = least(images, arguments.prompts, image_mb, best)
    table = Table(
        title=f"{images} candidates of {arguments.prompts} prompts, {image_mb:.2f} MB per image;"
        f" load {os.getloadavg()[0]:.1f}"
    )
    for column in (
        *("stage", "seconds", "CPU seconds", "GB at peak", "ms per candidate", "CPU ms", "least ms"),
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
        f"at best: {best.read:.0f} MB/s read, {best.write:.0f} MB/s written and synced, md5 {best.md5:.0f} MB/s,"
        f" {best.decode:.0f} images/s decoded"
    )


if __name__ == "__main__":
    main()
