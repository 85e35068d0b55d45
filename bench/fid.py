"""FID and KID: this project's code against clean-fid's own, in speed and in value.

    python -m bench.fid [--images 3000] [--dim 2048] [--tiny-dim 64] [--files 200]

Frechet and KID start from the same random features. The last two lines start from the same PNG files, with a
network of random weights in place of InceptionV3: decode, resize, embed, fit, compare. "Cached" is a
second comparison with the same reference; clean-fid keeps none for a network it does not know.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cleanfid import fid
from rich.console import Console
from rich.table import Table

from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.inception import WEIGHTS_FILE, InceptionFeatures
from srpo.evaluation.kernel import kid
from srpo.evaluation.metrics import FrechetDistance
from srpo.evaluation.reference import load_reference
from srpo.rewards.batches import BATCH, batched, to_tensor

SIZE = 256  # pixels of an image's side


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and what the function returned; what it prints is dropped."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        value = function()
    return time.perf_counter() - start, value


def from_features(count: int, dim: int) -> list[tuple[str, tuple, tuple]]:
    """Frechet and KID on two sets of `count` features, positive and correlated like a network's."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim) * np.linspace(1, 0.05, dim)
    x, y = (np.maximum(rng.normal(size=(count, dim)) @ mixing + shift, 0).astype("f4") for shift in (0.1, 0.2))
    one, other = gaussian(x), gaussian(y)
    theirs = timed(lambda: fid.frechet_distance(one.mean, one.covariance, other.mean, other.covariance))
    prompts = [str(i) for i in range(count)]
    return [
        (f"Frechet, {dim}-d", timed(lambda: frechet_distance(one, other)), theirs),
        (
            f"KID, {dim}-d, {count} images",
            timed(lambda: kid(x, y, prompts).value),
            timed(lambda: fid.kernel_distance(x.astype("f8"), y.astype("f8"))),
        ),
    ]


def from_files(count: int, folder: Path) -> list[tuple[str, tuple, tuple]]:
    """The whole way from two sets of `count` PNG files, as parquet for us and as folders for clean-fid."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 2048))
    network = _stand_in(layers, folder)
    for name, seed in {"new": 0, "reference": 1}.items():
        rng = np.random.default_rng(seed)
        (folder / name).mkdir()
        small = rng.integers(0, 256, (count, SIZE // 16, SIZE // 16, 3), dtype=np.uint8)
        cells = [encode_image(pixels.repeat(16, axis=0).repeat(16, axis=1)) for pixels in small]
        for i, cell in enumerate(cells):
            (folder / name / f"{i:05d}.png").write_bytes(cell["bytes"])
        rows = [{"image": cell} for cell in cells]
        parquet.write_table(folder / f"{name}.parquet", rows, {"image": IMAGE})
    theirs = timed(
        lambda: fid.compute_fid(
            str(folder / "new"), str(folder / "reference"), custom_feat_extractor=network.model, num_workers=0,
            batch_size=BATCH, device=torch.device("cpu"), verbose=False,
        )
    )  # fmt: skip

    def ours() -> float:
        reference = load_reference(folder / "reference.parquet", Extractor(network.features, "bench"), folder / "cache")
        metric = FrechetDistance(reference.gaussian)
        cells = (row["image"] for row in parquet.read_rows(folder / "new.parquet", ["image"]))
        for batch in batched(cells, BATCH):
            metric.update(network.features(to_tensor(batch)))
        return metric.compute()

    name = f"FID, {count} files"
    return [(name, timed(ours), theirs), (f"{name}, cached", timed(ours), theirs)]


def _stand_in(layers: torch.nn.Module, folder: Path) -> InceptionFeatures:
    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    torch.jit.script(Weights()).save(folder / WEIGHTS_FILE)
    return InceptionFeatures(torch.device("cpu"), folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--tiny-dim", type=int, default=64)
    parser.add_argument("--files", type=int, default=200)
    arguments = parser.parse_args()
    np.linalg.eigvalsh(np.eye(64))  # the first call of LAPACK starts its threads
    found = from_features(180, arguments.tiny_dim) + from_features(arguments.images, arguments.dim)
    with tempfile.TemporaryDirectory() as folder:
        found += from_files(arguments.files, Path(folder))
    table = Table(title=f"srpo against clean-fid, {torch.get_num_threads()} threads")
    for column in ("what", "srpo s", "clean-fid s", "times as fast", "srpo", "clean-fid", "relative difference"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, (ours, value), (theirs, other) in found:
        numbers = (f"{ours:.4f}", f"{theirs:.4f}", f"{theirs / ours:.1f}", f"{value:.6g}", f"{other:.6g}")
        table.add_row(name, *numbers, f"{abs(value - other) / abs(other):.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
