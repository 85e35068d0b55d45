"""Images from elsewhere: reference sets and folders of image files, in any format and mode that Pillow reads.

An image is rotated as its EXIF data says, transparent parts are on white, 16 bits are scaled to 8, CMYK is converted.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from srpo.data import parquet
from srpo.errors import UserError, one_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
LOOKAHEAD = 64


class StoredImage(NamedTuple):
    """An encoded image: its file, or its bytes in a parquet file; and a name for messages."""

    name: str
    source: Path | bytes


def read_image(image: StoredImage) -> np.ndarray:
    """Return uint8 [height, width, 3].

    Raises:
        UserError: it is not a readable image, or of floating-point numbers.
    """
    try:
        with Image.open(io.BytesIO(image.source) if isinstance(image.source, bytes) else image.source) as file:
            return np.array(_to_rgb(ImageOps.exif_transpose(file)))
    except UNREADABLE as error:
        raise UserError(f"{image.name}: not a readable image ({one_line(error):.120})") from None


def read_images(images: Iterator[StoredImage]) -> Iterator[np.ndarray]:
    """Yield the pixels of these images in order, decoded on all cores.

    Raises:
        UserError: one is not a readable image.
    """
    with ThreadPoolExecutor() as pool:
        while part := list(islice(images, LOOKAHEAD)):
            yield from pool.map(read_image, part)


def find_images(path: Path) -> Iterator[StoredImage]:
    """Yield the images of a parquet file, of a folder of parquet files, or of a folder of image files, in name order.

    A parquet file has a column `image` of bytes, of paths, or of both as in Hugging Face datasets. Paths are relative
    to the file's folder.

    Raises:
        UserError: there are no images, or a cell has none.
    """
    if path.is_dir() and not list(path.glob("*.parquet")):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path}: no images; a folder of {', '.join(sorted(SUFFIXES))} or parquet files is needed")
        yield from (StoredImage(str(file), file) for file in files)
        return
    for shard in parquet.shards(path):
        yield from (stored_image(shard, row, cell) for row, cell in enumerate(_cells(shard)))


def check_images(path: Path) -> int:
    """Read all images of a parquet file or folder, and return their number.

    Raises:
        UserError: there are no images, or one is not readable; the line names its file and row.
    """
    count = 0
    for _ in read_images(find_images(path)):
        count += 1
    return count


def _cells(shard: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            if "image" not in file.schema_arrow.names:
                raise UserError(f"{shard}: has no column 'image'")
            for batch in file.iter_batches(LOOKAHEAD, columns=["image"]):
                yield from batch.column("image").to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard}: not a readable parquet file ({one_line(error):.120})") from None


def stored_image(shard: Path, row: int, cell: Any) -> StoredImage:
    """Return the image of a cell: bytes, a path relative to the parquet file's folder, or a struct of both.

    Raises:
        UserError: there is none.
    """
    name = f"{shard}: row {row}"
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return StoredImage(name, cell)
    if not isinstance(cell, str):
        raise UserError(f"{name}: no image in column `image`; write bytes, or the path of a file")
    file = shard.parent / cell
    if not file.is_file():
        raise UserError(f"{name}: no such file: {file}; write the image's bytes, or a path relative to {shard.parent}")
    return StoredImage(f"{name} ({cell})", file)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them to 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.max(initial=0) > 255:
            pixels = pixels >> 8
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
