"""The images of the tiny world: one to three colored shapes of any size, anywhere, on a background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 4
COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 220, 60),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "purple": (150, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": (245, 245, 245), "grey": (135, 135, 135), "black": (15, 15, 15)}
RADII = {1: (9.0, 15.0), 2: (8.0, 11.0), 3: (7.5, 9.0)}
"""Smallest and largest radius in pixels, by the number of shapes in the image."""
EXTENT = 1.15
"""How far the widest shape reaches from its center, in radii."""
GAP = 2.0
"""Pixels that stay free between shapes, and between a shape and the edge of the image."""


@dataclass(frozen=True)
class Item:
    """One shape of a scene: its center and radius in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    background: str
    items: tuple[Item, ...]


def apart(one: Item, two: Item) -> bool:
    """Return whether two shapes leave a gap between them."""
    least = EXTENT * (one.radius + two.radius) + GAP
    return max(abs(one.x - two.x), abs(one.y - two.y)) >= least


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the image, uint8 [64, 64, 3]. Shades vary a little by `rng`."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, _shade(BACKGROUNDS[scene.background], 8, rng))
    pen = ImageDraw.Draw(canvas)
    for item in scene.items:
        color = _shade(COLORS[item.color], 10, rng)
        for outline in outlines(item.shape, item.x, item.y, item.radius):
            points = [(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in outline]
            pen.ellipse(points, fill=color) if item.shape == "circle" else pen.polygon(points, fill=color)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def outlines(shape: str, x: float, y: float, radius: float) -> list[list[tuple[float, float]]]:
    """Return the polygons of a shape, or the corners of a circle's box."""

    def box(width: float, height: float) -> list[tuple[float, float]]:
        return [(x - width, y - height), (x + width, y - height), (x + width, y + height), (x - width, y + height)]

    if shape == "circle":
        return [[(x - radius, y - radius), (x + radius, y + radius)]]
    if shape == "square":
        return [box(radius, radius)]
    if shape == "triangle":
        wide = EXTENT * radius
        return [[(x, y - 1.1 * radius), (x + wide, y + radius), (x - wide, y + radius)]]
    return [box(EXTENT * radius, 0.38 * radius), box(0.38 * radius, EXTENT * radius)]


def _shade(color: tuple[int, int, int], most: float, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.round(np.array(color) + rng.uniform(-most, most, 3)), 0, 255))
