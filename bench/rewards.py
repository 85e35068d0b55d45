"""Preparing images for a reward: this project's tensors against the PIL processor that a user would run otherwise.

    python -m bench.rewards [--images 32] [--size 1024] [--repeats 5]

Both start from the same decoded uint8 images and end in the same float32 batch. A reward's forward pass is the
same either way and left out. The table gives the best of the repeats, and how far apart the two batches are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPImageProcessor

from srpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess

try:  # transformers 5 keeps the PIL way under another name
    from transformers import CLIPImageProcessorPil
except ImportError:
    CLIPImageProcessorPil = CLIPImageProcessor


def best(function: Callable[[], torch.Tensor], repeats: int) -> tuple[float, torch.Tensor]:
    """Seconds of the fastest repeat, and what it returned."""
    seconds = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def by_hand(pixels: list[np.ndarray]) -> torch.Tensor:
    """PIL and numpy, image by image, as the reward models' own repositories do it."""
    mean, std = np.array(OPENAI_MEAN, np.float32), np.array(OPENAI_STD, np.float32)
    prepared = [
        (np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255 - mean) / std
        for one in pixels
    ]
    return torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    pixels = list(rng.integers(0, 256, (arguments.images, arguments.size, arguments.size, 3), dtype=np.uint8))
    processor, prepare = CLIPImageProcessorPil(), Preprocess()
    ways = {
        "transformers' PIL processor": lambda: torch.as_tensor(
            np.stack(processor([Image.fromarray(one) for one in pixels], return_tensors="np")["pixel_values"])
        ),
        "PIL by hand": lambda: by_hand(pixels),
        f"srpo, tensors on {device.type}": lambda: prepare(
            torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), device
        ),
    }
    found = {name: best(way, arguments.repeats) for name, way in ways.items()}
    first, reference = next(iter(found.values()))
    table = Table(title=f"{arguments.images} images {arguments.size}x{arguments.size} to 224x224")
    for column in ("way", "ms an image", "times as fast", "largest difference"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, (seconds, batch) in found.items():
        off = (batch.cpu() - reference).abs().amax(dim=(0, 2, 3)) * torch.tensor(OPENAI_STD) * 255
        each = f"{1000 * seconds / arguments.images:.2f}"
        table.add_row(name, each, f"{first / seconds:.2f}", f"{off.max():.2f}/255")
    Console().print(table)


if __name__ == "__main__":
    main()
