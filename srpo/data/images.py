"""Image cells of datasets: encoding, decoding, and batches of them as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    pass


def encode_png(pixels: np.ndarray) -> dict[str, Any]:
    """An image cell from uint8 pixels [height, width, 3]. PNG level 1: 2.4 times faster than 6, same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def decode_image(cell: Mapping[str, Any]) -> Image.Image:
    """The RGB picture of an image cell."""
    return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")


def decode_images(cells: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """uint8 [n, height, width, 3] from image cells of one size."""
    return np.stack([np.asarray(decode_image(cell)) for cell in cells])
