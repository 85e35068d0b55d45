"""Statistics of single images that depend on neither prompt nor reward: reward hacking shows in them first."""

from __future__ import annotations

import numpy as np

from srpo.data.metric_keys import IMAGE_STATS

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
EDGE = 0.1 * 255


def image_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return each statistic of each image, float64 [n].

    saturation: mean over pixels of HSV's saturation, (max - min) / max of the channels; 0 to 1.
    contrast: standard deviation of luma as a share of its range; 0 to 0.5.
    edge_density: share of pixels whose luma differs from that to the right or below by more than a tenth of its
        range; 0 to 1.
    color_entropy: Shannon entropy of the colors in 8 x 8 x 8 bins; 0 to 9 bits.

    Args:
        images: uint8 [n, 3, height, width], RGB.
    """
    measures = (_saturation, _contrast, _edge_density, _color_entropy)
    # decoded images have their channels last in memory, which makes every step here twice as slow
    rows = [[measure(image) for measure in measures] for image in map(np.ascontiguousarray, images)]
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(IMAGE_STATS)).T.copy()
    return dict(zip(IMAGE_STATS, columns, strict=True))


def _saturation(image: np.ndarray) -> float:
    high, low = image.max(axis=0), image.min(axis=0)
    return float(np.mean((high - low) / np.maximum(high, 1), dtype=np.float64))


def _contrast(image: np.ndarray) -> float:
    return float(np.std(_luma(image), dtype=np.float64)) / 255


def _edge_density(image: np.ndarray) -> float:
    luma = _luma(image)
    across = np.abs(np.diff(luma, axis=1))[:-1]
    down = np.abs(np.diff(luma, axis=0))[:, :-1]
    return float(np.mean(np.maximum(across, down) > EDGE))


def _color_entropy(image: np.ndarray) -> float:
    red, green, blue = (image >> 5).astype(np.int64)
    share = np.bincount((red * 64 + green * 8 + blue).ravel()) / red.size
    share = share[share > 0]
    return float(max(0.0, -(share * np.log2(share)).sum()))


def _luma(image: np.ndarray) -> np.ndarray:
    return np.tensordot(LUMA, image, axes=1)
