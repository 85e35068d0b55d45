"""What each image shows, and where, as labels for the image encoder of a CLIP.

Captions alone teach a small CLIP colors within minutes, but shapes, counts and places only after hours.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch.nn import functional

from demo.scenes import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene

PATCHES = 8
KINDS, GROUPS = len(COLORS) * len(SHAPES), len(COLORS) + len(SHAPES) + 1
SPREAD = 12.0
"""Pixels, about the standard deviation of centers."""
PATCH_WEIGHT, KIND_WEIGHT, CENTER_WEIGHT = 4.0, 1.0, 2.0


class Labels:
    """The labels of all scenes.

    Attributes:
        color, shape: of each patch, int64 [n, 64]; 0 is the background.
        background: int64 [n].
        kinds: which of the 24 pairs of color and shape are there, float32 [n, 24].
        centers: mean center of the shapes of each color, of each form, and of all, from the middle of the image and in
            units of SPREAD, float32 [n, 11, 2]; NaN where there are none.
    """

    def __init__(self, scenes: list[Scene], device: torch.device) -> None:
        colors = list(COLORS)
        patches = np.zeros((2, len(scenes), PATCHES**2), dtype=np.int64)
        kinds = np.zeros((len(scenes), KINDS), dtype=np.float32)
        centers = np.full((len(scenes), GROUPS, 2), np.nan, dtype=np.float32)
        step = SIZE // PATCHES
        y, x = (step * axis.ravel() + step / 2 for axis in np.mgrid[:PATCHES, :PATCHES])
        for row, scene in enumerate(scenes):
            groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for item in scene.items:
                color, shape = colors.index(item.color), SHAPES.index(item.shape)
                inside = (abs(x - item.x) < item.radius) & (abs(y - item.y) < item.radius)
                patches[0, row, inside], patches[1, row, inside] = 1 + color, 1 + shape
                kinds[row, color * len(SHAPES) + shape] = 1
                for group in (color, len(COLORS) + shape, GROUPS - 1):
                    groups[group].append((item.x, item.y))
            for group, places in groups.items():
                centers[row, group] = (np.mean(places, axis=0) - SIZE / 2) / SPREAD
        names = list(BACKGROUNDS)
        self.background = torch.tensor([names.index(scene.background) for scene in scenes], device=device)
        self.color, self.shape = torch.from_numpy(patches).to(device)
        self.kinds, self.centers = torch.from_numpy(kinds).to(device), torch.from_numpy(centers).to(device)


class Reader(torch.nn.Module):
    """Two linear layers that read labels from an image encoder's output. They are thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = torch.nn.Linear(width, len(COLORS) + 1 + len(SHAPES) + 1)
        self.image = torch.nn.Linear(width, len(BACKGROUNDS) + KINDS + 2 * GROUPS)

    def loss(self, hidden: torch.Tensor, labels: Labels, rows: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the errors.

        Args:
            hidden: the image encoder's last hidden state, float32 [n, 65, width].
            rows: int64 [n], which scenes the images show.
        """
        color, shape = self.patches(hidden[:, 1:]).transpose(1, 2).split([len(COLORS) + 1, len(SHAPES) + 1], dim=1)
        patches = functional.cross_entropy(color, labels.color[rows])
        patches = patches + functional.cross_entropy(shape, labels.shape[rows])
        background, kinds, centers = self.image(hidden[:, 0]).split([len(BACKGROUNDS), KINDS, 2 * GROUPS], dim=1)
        told = functional.binary_cross_entropy_with_logits(kinds, labels.kinds[rows], reduction="sum") / len(rows)
        known = labels.centers[rows].isfinite()
        placed = functional.mse_loss(centers.view_as(known)[known], labels.centers[rows][known])
        told = told + functional.cross_entropy(background, labels.background[rows])
        return PATCH_WEIGHT * patches + KIND_WEIGHT * told + CENTER_WEIGHT * placed
