"""Decoding of many image cells at once. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_webp

from srpo.data.images import decode_image, image_threads


def decode_images(cells: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Return uint8 [n, height, width, 3] of one or more image cells of one size, decoded on all cores.

    Raises:
        ValueError: the images differ in size.
    """
    cells = list(cells)
    first = _decoded(cells[0])
    pixels = np.empty((len(cells), *first.shape), np.uint8)

    def decode(number: int) -> None:
        image = _decoded(cells[number]) if number else first
        if image.shape != first.shape:
            raise ValueError(f"images of several sizes: {first.shape[:2]} and {image.shape[:2]}")
        pixels[number] = image

    for _ in image_threads().map(decode, range(len(cells))):
        pass
    return pixels


def _decoded(cell: Mapping[str, Any]) -> np.ndarray:
    if not cell["bytes"].startswith(b"RIFF"):
        return np.asarray(decode_image(cell))
    # a quarter less time than with Pillow, which copies the pixels more often
    data = torch.frombuffer(bytearray(cell["bytes"]), dtype=torch.uint8)
    return decode_webp(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
