"""Images from elsewhere: each odd one is read right, or named by file and row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from srpo.data.image_files import StoredImage, check_images, find_images, read_image, read_images
from srpo.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes) -> np.ndarray:
    return read_image(StoredImage("image", data))


def table(path: Path, column: pl.Series) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column.alias("image").to_frame().write_parquet(path)
    return path


PNGS = [encoded(Image.fromarray(pixels)) for pixels in PIXELS]
CELL = pl.Struct({"bytes": pl.Binary, "path": pl.String})


@pytest.mark.parametrize("kind", ["bytes", "cells", "paths", "paths in cells", "folder", "folder of parquet"])
def test_every_way_to_store_images(kind: str, tmp_path: Path) -> None:
    for number, png in enumerate(PNGS):
        (tmp_path / f"{number}.png").write_bytes(png)
    names = [f"{number}.png" for number in range(5)]
    columns = {
        "bytes": pl.Series(PNGS),
        "cells": pl.Series([{"bytes": png, "path": None} for png in PNGS], dtype=CELL),
        "paths": pl.Series(names),
        "paths in cells": pl.Series([{"bytes": None, "path": name} for name in names], dtype=CELL),
        "folder of parquet": pl.Series(PNGS),
    }
    path = tmp_path if kind == "folder" else table(tmp_path / "images.parquet", columns[kind])
    path = path.parent if kind == "folder of parquet" else path
    assert np.array_equal(np.stack(list(read_images(find_images(path)))), PIXELS)


def test_rotated() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(read(encoded(Image.fromarray(PIXELS[0]), exif=exif)), np.rot90(PIXELS[0], -1))


def test_transparent_parts_are_white() -> None:
    alpha = np.dstack([PIXELS[0], np.zeros((12, 16), np.uint8)])
    alpha[:, 8:, 3] = 255
    pixels = read(encoded(Image.fromarray(alpha)))
    assert (pixels[:, :8] == 255).all() and np.array_equal(pixels[:, 8:], PIXELS[0][:, 8:])
    palette = Image.fromarray(PIXELS[0]).quantize(4)
    pixels = read(encoded(palette, transparency=palette.getpixel((3, 3))))
    assert (pixels[3, 3] == 255).all()


def test_sixteen_bits_are_scaled() -> None:
    gray = (PIXELS[0][..., 0].astype(np.uint16) << 8) + 7
    assert np.array_equal(read(encoded(Image.fromarray(gray))), np.repeat(PIXELS[0][..., :1], 3, axis=2))


def test_cmyk() -> None:
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    pixels = read(encoded(Image.fromarray(red).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - red).max() < 4


CUT = encoded(Image.fromarray(PIXELS[1]), "JPEG")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([PNGS[0], CUT[: len(CUT) // 2]], r"images\.parquet: row 1: not a readable image"),
        ([PNGS[0], b"text"], r"images\.parquet: row 1: not a readable image \(cannot identify"),
        ([PNGS[0], None], r"images\.parquet: row 1: no image in column `image`"),
        (["gone.png"], r"images\.parquet: row 0: no such file: .*gone\.png"),
        ([3.5], r"images\.parquet: row 0: no image"),
    ],
    ids=["cut", "text", "null", "path", "number"],
)
def test_bad_cells_are_named_by_row(cells: list, message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "images.parquet", pl.Series(cells))
    with pytest.raises(UserError, match=message) as error:
        check_images(path)
    assert "\n" not in str(error.value)


def test_floats_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="floating-point pixels"):
        read(encoded(Image.fromarray(PIXELS[0][..., 0].astype(np.float32)), "TIFF"))
    with pytest.raises(UserError, match="no images; a folder of"):
        list(find_images(tmp_path))
