"""Image cells: lossless, in order, of one size, on any number of threads."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from srpo.data import images
from srpo.data.decoding import decode_images
from srpo.data.images import encode_image, encode_images


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(request.param))
    images.image_threads.cache_clear()
    yield request.param
    images.image_threads.cache_clear()


def test_cells_are_lossless_and_in_order(pool: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 33, 3), dtype=np.uint8)
    cells = encode_images(pixels)
    assert np.array_equal(decode_images(cells), pixels)
    assert cells == [encode_image(image) for image in pixels]
    assert images.image_threads()._max_workers == pool


def test_other_formats_are_decoded_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 33, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels[0]).save(png, "PNG")
    assert np.array_equal(decode_images([{"bytes": png.getvalue()}, encode_image(pixels[1])]), pixels)


def test_images_of_several_sizes_are_an_error() -> None:
    cells = [encode_image(np.zeros((size, 4, 3), np.uint8)) for size in (4, 1)]
    with pytest.raises(ValueError, match="several sizes"):
        decode_images(cells)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_decodes(pool: int) -> None:
    cells = encode_images(np.zeros((4, 8, 8, 3), np.uint8))
    child = os.fork()
    if not child:
        os._exit(0 if decode_images(cells).shape == (4, 8, 8, 3) else 1)
    assert os.waitpid(child, 0)[1] == 0
