"""Statistics of images whose statistics are known."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from srpo.data.metric_keys import IMAGE_STATS
from srpo.evaluation.image_stats import image_stats


def one(pixels: np.ndarray) -> dict[str, float]:
    """Statistics of uint8 [height, width, 3]."""
    return {name: float(values[0]) for name, values in image_stats(pixels.transpose(2, 0, 1)[None]).items()}


def test_gray_image() -> None:
    assert one(np.full((8, 8, 3), 128, np.uint8)) == dict.fromkeys(IMAGE_STATS, 0)
    assert one(np.zeros((8, 8, 3), np.uint8)) == dict.fromkeys(IMAGE_STATS, 0)


def test_checkerboard() -> None:
    board = np.indices((8, 8)).sum(axis=0) % 2 * 255
    found = one(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    assert found == pytest.approx({"saturation": 0, "contrast": 0.5, "edge_density": 1, "color_entropy": 1}, abs=1e-6)


def test_saturation_and_entropy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = one(pixels)
    assert found["saturation"] == pytest.approx(
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in (pixels / 255).reshape(-1, 3)]), abs=1e-6
    )
    _, counts = np.unique((pixels // 32).reshape(-1, 3), axis=0, return_counts=True)
    share = counts / 256
    assert found["color_entropy"] == pytest.approx(-(share * np.log2(share)).sum())


def test_single_edge() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:, 5:] = (255, 0, 0)
    found = one(pixels)
    assert found["saturation"] == 0.5 and found["edge_density"] == pytest.approx(1 / 9)
    assert found["color_entropy"] == 1
    assert found["contrast"] == pytest.approx(0.299 / 2, abs=1e-6)


def test_batch_equals_single_images() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (5, 3, 12, 9), dtype=np.uint8)
    whole, parts = image_stats(batch), [image_stats(batch[i : i + 1]) for i in range(5)]
    for name in IMAGE_STATS:
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts]))
