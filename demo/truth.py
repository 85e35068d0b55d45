"""Read an image of the tiny world exactly, and hold it against a caption."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from demo.captions import Caption, ahead, at_place
from demo.scenes import BACKGROUNDS, COLORS, RADII, SHAPES, Item, Scene, outlines

NEAR_COLOR, NEAR_BACKGROUND = 70.0, 100.0
"""Largest distance in RGB at which a color or background is still taken for one of the world's."""
CONTRAST = 0.45
"""Share of the way from the background to the shape's color from which on a pixel belongs to the shape."""
LEAST_AREA = 30
LEAST_OVERLAP = 0.68
"""A shape is one if its mask and the ideal one have this intersection over union: outlines may be soft."""
CLEAR, APART = 4.0, 4.0
"""Places and relations are judged more leniently than scenes are drawn."""
GRID = 24


@dataclass(frozen=True)
class Seen:
    """What an image shows; None is nothing of this world."""

    background: str | None
    items: tuple[Item, ...] | None


def read_image(image: np.ndarray) -> Seen:
    """Read an image, uint8 [64, 64, 3]: its background, and its shapes in the order of their places."""
    pixels = image.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                           pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    paper = np.median(edge, axis=0)
    background = _nearest(paper, BACKGROUNDS, NEAR_BACKGROUND)
    if background is None:
        return Seen(None, None)
    distance = np.linalg.norm(pixels - paper, axis=2)
    blobs, number = ndimage.label(distance > 45)
    items: list[Item] = []
    for index in range(1, number + 1):
        inside = blobs == index
        if inside.sum() < LEAST_AREA:
            if inside.sum() > LEAST_AREA // 3:
                return Seen(background, None)
            continue
        item = _read_item(pixels, distance, inside)
        if item is None:
            return Seen(background, None)
        items.append(item)
    return Seen(background, tuple(items) if 1 <= len(items) <= 3 else None)


def _read_item(pixels: np.ndarray, distance: np.ndarray, inside: np.ndarray) -> Item | None:
    deep = distance[inside]
    core = inside & (distance >= np.quantile(deep, 0.6))
    shade = np.median(pixels[core], axis=0)
    color = _nearest(shade, COLORS, NEAR_COLOR)
    if color is None:
        return None
    mask = inside & (distance > CONTRAST * np.median(distance[core]))
    labels, number = ndimage.label(mask)
    if number > 1:  # crumbs of the outline
        sizes = ndimage.sum_labels(mask, labels, range(1, number + 1))
        mask = labels == 1 + int(np.argmax(sizes))
    rows, columns = np.where(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    if min(bottom - top, right - left) < 8 or not 0.75 < (bottom - top) / (right - left) < 1.33:
        return None
    cut = Image.fromarray(mask[top:bottom, left:right]).resize((GRID, GRID), Image.Resampling.NEAREST)
    grid = np.asarray(cut)
    overlaps = {shape: (grid & ideal).sum() / (grid | ideal).sum() for shape, ideal in _ideals().items()}
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < LEAST_OVERLAP:
        return None
    width = {"circle": 2.0, "square": 2.0}.get(shape, 2.3)
    height = {"circle": 2.0, "square": 2.0, "triangle": 2.1}.get(shape, 2.3)
    radius = ((right - left) / width + (bottom - top) / height) / 2
    return Item(color, shape, (left + right) / 2, (top + bottom) / 2, radius)


@cache
def _ideals() -> dict[str, np.ndarray]:
    """Return every shape, filling a square of GRID pixels: bool [24, 24]."""
    masks = {}
    for shape in SHAPES:
        canvas = Image.new("L", (320, 320))
        pen = ImageDraw.Draw(canvas)
        for points in outlines(shape, 160, 160, 100):
            pen.ellipse(points, fill=255) if shape == "circle" else pen.polygon(points, fill=255)
        cut = canvas.crop(canvas.getbbox()).resize((GRID, GRID), Image.Resampling.BOX)
        masks[shape] = np.asarray(cut) > 127
    return masks


def _nearest(shade: np.ndarray, palette: dict[str, tuple[int, int, int]], most: float) -> str | None:
    distances = {name: float(np.linalg.norm(shade - np.array(value))) for name, value in palette.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= most else None


def parts_right(caption: Caption, seen: Seen) -> dict[str, bool]:
    """Return which parts of a caption an image shows: count, color, shape, and of place, background and relation
    those that the caption says. All are false if the image can't be read.
    """
    said = ["count", *(part for part in ("color", "shape") if any(getattr(item, part) for item in caption.items))]
    said += [part for part in ("place", "background", "relation") if getattr(caption, part)]
    if seen.items is None:
        return dict.fromkeys(said, False) | (
            {"background": seen.background == caption.background} if caption.background else {}
        )
    right = {"count": len(seen.items) == len(caption.items)}
    for part in ("color", "shape"):
        if part in said:
            wanted = [getattr(item, part) for item in caption.items]
            shown = [getattr(item, part) for item in seen.items]
            right[part] = len(wanted) == len(shown) and any(
                all(want in (None, show) for want, show in zip(wanted, order, strict=True))
                for order in permutations(shown)
            )
    if caption.place:
        right["place"] = len(seen.items) == 1 and at_place(caption.place, seen.items[0].x, seen.items[0].y, CLEAR)
    if caption.background:
        right["background"] = seen.background == caption.background
    if caption.relation:
        right["relation"] = matched(caption, seen) is not None
    return right


def matched(caption: Caption, seen: Seen) -> tuple[Item, ...] | None:
    """Return the image's shapes in the caption's order if all that the caption says of them is true, else None."""
    if seen.items is None or len(seen.items) != len(caption.items):
        return None
    if caption.background not in (None, seen.background):
        return None
    for order in permutations(seen.items):
        if not all(named.fits(item.color, item.shape) for named, item in zip(caption.items, order, strict=True)):
            continue
        if caption.place and not at_place(caption.place, order[0].x, order[0].y, CLEAR):
            continue
        if caption.relation and ahead(caption.relation, order[0], order[1]) < APART:
            continue
        return order
    return None


def true_of(captions: list[Caption], scenes: list[Scene]) -> np.ndarray:
    """Return which captions are true of which scenes: bool [scenes, captions]. As `matched`, many at once."""
    truth = np.zeros((len(scenes), len(captions)), dtype=bool)
    background = np.array([scene.background for scene in scenes])
    for number in RADII:
        rows = np.array([i for i, scene in enumerate(scenes) if len(scene.items) == number], dtype=int)
        if not len(rows):
            continue
        parts = {
            part: np.array([[getattr(item, part) for item in scenes[i].items] for i in rows])
            for part in ("color", "shape", "x", "y")
        }
        for column, caption in enumerate(captions):
            if len(caption.items) == number:
                truth[rows, column] = _true_of_all(caption, parts, background[rows])
    return truth


def _true_of_all(caption: Caption, parts: dict[str, np.ndarray], background: np.ndarray) -> np.ndarray:
    found = np.zeros(len(background), dtype=bool)
    orders = [tuple(range(len(caption.items)))] if caption.kind == "count" else permutations(range(len(caption.items)))
    for order in orders:
        right = np.ones(len(background), dtype=bool)
        for named, item in zip(caption.items, order, strict=True):
            for part in ("color", "shape"):
                if said := getattr(named, part):
                    right &= parts[part][:, item] == said
        if caption.relation:
            axis = "x" if caption.relation in ("left of", "right of") else "y"
            further = parts[axis][:, order[0]] - parts[axis][:, order[1]]
            right &= (further if caption.relation in ("right of", "below") else -further) >= APART
        found |= right
    if caption.place:
        found &= [at_place(caption.place, x, y, CLEAR) for x, y in zip(parts["x"][:, 0], parts["y"][:, 0], strict=True)]
    if caption.background:
        found &= background == caption.background
    return found


ATTRIBUTES = ("color", "shape", "column", "row", "size", "background", "direction")


def open_attributes(caption: Caption, seen: Seen) -> list[int]:
    """Return the value of each of ATTRIBUTES, -1 where the caption says it, or where the image is not right.

    Of several shapes, color and shape are those of all of them in the order of their places, size is the first one's,
    and direction is where the second is from the first. Column and row are those of the only shape.
    """
    items = matched(caption, seen)
    values = dict.fromkeys(ATTRIBUTES, -1)
    if items is None:
        return list(values.values())
    first = items[0]
    if any(named.color is None for named in caption.items):
        values["color"] = _index([list(COLORS).index(item.color) for item in items], len(COLORS))
    if any(named.shape is None for named in caption.items):
        values["shape"] = _index([SHAPES.index(item.shape) for item in items], len(SHAPES))
    if len(items) == 1 and caption.place != "center":
        values["column"] = -1 if caption.place in ("left", "right") else _third(first.x, 12, 52)
        values["row"] = -1 if caption.place in ("top", "bottom") else _third(first.y, 12, 52)
    values["size"] = _third(first.radius, *RADII[len(items)])
    if caption.background is None:
        values["background"] = list(BACKGROUNDS).index(str(seen.background))
    if caption.kind == "pair":
        right, down = items[1].x - first.x, items[1].y - first.y
        values["direction"] = (0 if right > 0 else 1) if abs(right) > abs(down) else (2 if down > 0 else 3)
    if caption.kind == "relation":
        across = items[1].y - first.y if caption.relation in ("left of", "right of") else items[1].x - first.x
        values["direction"] = int(across > 0)
    return list(values.values())


def _index(digits: list[int], base: int) -> int:
    return sum(digit * base**place for place, digit in enumerate(digits))


def _third(value: float, low: float, high: float) -> int:
    return int(np.clip(3 * (value - low) / (high - low), 0, 2))
