"""The tiny world: one colored shape, somewhere, on a background. Images, captions, and wrong captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

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
POSITIONS = {"left": (18, 32), "right": (46, 32), "top": (32, 18), "bottom": (32, 46), "center": (32, 32)}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (135, 135, 135), "black": (15, 15, 15)}


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    color: str
    shape: str
    position: str
    background: str

    @property
    def caption(self) -> str:
        """The one sentence that says it."""
        return f"a {self.color} {self.shape} at the {self.position} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every scene there is, 360 of them, in a fixed order."""
    return [Scene(*parts) for parts in product(COLORS, SHAPES, POSITIONS, BACKGROUNDS)]


def miscaptioned(scene: Scene, rng: np.random.Generator, wrong: float) -> Scene:
    """The scene that a careless caption would name: each of its four parts replaced with probability `wrong`.

    The replacement is any value of that part. Mistakes are scattered on purpose: a model that learns from them is
    wrong now and then for every prompt, so that among its candidates there is something to select. One that learned
    a fixed confusion is always wrong for some prompts and never for others, and best-of-N has no choice.
    """
    values = {"color": tuple(COLORS), "shape": SHAPES, "position": tuple(POSITIONS), "background": tuple(BACKGROUNDS)}
    return replace(scene, **{part: str(rng.choice(names)) for part, names in values.items() if rng.random() < wrong})


def render(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8 [64, 64, 3]. With `rng` place, size and shade vary a little; without it the image is the template."""
    jitter = rng.uniform(-1, 1, 9) if rng else np.zeros(9)
    x, y = np.array(POSITIONS[scene.position]) + 1.5 * jitter[:2]
    radius = 12 + 1.0 * jitter[2]
    color = _shade(COLORS[scene.color], 10 * jitter[3:6])
    paper = _shade(BACKGROUNDS[scene.background], 8 * jitter[6:9])
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, paper)
    pen = ImageDraw.Draw(canvas)
    for part in _outlines(scene.shape, x, y, radius):
        points = [(SUPERSAMPLING * px, SUPERSAMPLING * py) for px, py in part]
        pen.ellipse(points, fill=color) if scene.shape == "circle" else pen.polygon(points, fill=color)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def _outlines(shape: str, x: float, y: float, r: float) -> list[list[tuple[float, float]]]:
    def box(w: float, h: float) -> list[tuple[float, float]]:
        return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]

    if shape == "circle":
        return [[(x - r, y - r), (x + r, y + r)]]
    if shape == "square":
        return [box(r, r)]
    if shape == "triangle":
        return [[(x, y - 1.1 * r), (x + 1.15 * r, y + r), (x - 1.15 * r, y + r)]]
    return [box(1.15 * r, 0.38 * r), box(0.38 * r, 1.15 * r)]


def _shade(color: tuple[int, int, int], change: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.round(np.array(color) + change), 0, 255))
