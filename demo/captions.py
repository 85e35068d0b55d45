"""The captions of the tiny world: what they say, what they leave open, and scenes that they are true of.

There are six kinds: an object ("a red circle", "a red shape", "a circle"), an object at a place, an object on a
background, a count ("two squares"), a pair of objects, and a relation of two ("a red circle left of a blue square").
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import numpy as np

from demo.scenes import BACKGROUNDS, COLORS, EXTENT, GAP, RADII, SHAPES, SIZE, Item, Scene, apart

KINDS = ("object", "place", "background", "count", "pair", "relation")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {1: "a", 2: "two", 3: "three"}
PARTS = ("color", "shape", "place", "background", "count", "relation", "binding")
MIDDLE = SIZE / 2
CLEAR = 9.0
"""Pixels from the middle line from which on a scene is drawn as left, right, top or bottom."""
DRAWN_APART = 12.0
"""Pixels between two centers, along the axis of a relation, from which on a scene is drawn as such."""
Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Named:
    """What a caption says of one shape; None is left open."""

    color: str | None
    shape: str | None

    def text(self, number: int = 1) -> str:
        """Return a phrase such as "a red circle", "an orange shape" or "two crosses"."""
        noun = self.shape or "shape"
        if number > 1:
            noun += "es" if noun.endswith("s") else "s"
        words = " ".join(word for word in (self.color, noun) if word)
        article = "an" if number == 1 and words[0] in "aeiou" else NUMBERS[number]
        return f"{article} {words}"

    def fits(self, color: str | None, shape: str | None) -> bool:
        """Return whether a shape of this color and form is as named."""
        return self.color in (None, color) and self.shape in (None, shape)


@dataclass(frozen=True)
class Caption:
    """What a caption says.

    Attributes:
        items: the shapes; several equal ones are a count.
        place: where the only one is, a key of PLACES.
        background: a key of BACKGROUNDS.
        relation: of the first to the second, one of RELATIONS.
    """

    items: tuple[Named, ...]
    place: str | None = None
    background: str | None = None
    relation: str | None = None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.relation:
            return "relation"
        if len(self.items) > 1:
            return "count" if self.items[0] == self.items[1] else "pair"
        if self.place:
            return "place"
        return "background" if self.background else "object"

    @property
    def text(self) -> str:
        """The words."""
        if self.kind == "count":
            words = self.items[0].text(len(self.items))
        else:
            words = f" {self.relation or 'and'} ".join(item.text() for item in self.items)
        words += f" {PLACES[self.place]}" if self.place else ""
        return words + (f" on a {self.background} background" if self.background else "")


_ITEM = rf"(?:(?P<color{{0}}>{'|'.join(COLORS)}) )?(?P<shape{{0}}>shape|{'|'.join(SHAPES)})"
_GRAMMAR = re.compile(
    rf"(?P<number>an?|two|three) {_ITEM.format(1)}(?:e?s)?"
    rf"(?: (?P<link>and|{'|'.join(RELATIONS)}) an? {_ITEM.format(2)})?"
    rf"(?: (?P<place>{'|'.join(PLACES.values())}))?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse(text: str) -> Caption:
    """Return what a caption says.

    Raises:
        ValueError: it is none of this world's captions.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a caption of the tiny world")
    said = match.groupdict()
    number = {"two": 2, "three": 3}.get(said["number"], 1)
    items = [Named(said["color1"], None if said["shape1"] == "shape" else said["shape1"])] * number
    if said["link"]:
        items.append(Named(said["color2"], None if said["shape2"] == "shape" else said["shape2"]))
    place = next((name for name, words in PLACES.items() if words == said["place"]), None)
    caption = Caption(tuple(items), place, said["background"], said["link"] if said["link"] in RELATIONS else None)
    if caption.text != text:
        raise ValueError(f"{text!r} is not a caption of the tiny world; did you mean {caption.text!r}?")
    return caption


EXACT = tuple(Named(color, shape) for color, shape in product(COLORS, SHAPES))
"""Every shape that is named fully."""


def all_captions() -> dict[str, list[Caption]]:
    """Return every caption there is, by kind, in a fixed order."""
    open_ones = [Named(color, None) for color in COLORS] + [Named(None, shape) for shape in SHAPES]
    pairs = [(one, two) for one, two in product(EXACT, EXACT) if one.color != two.color and one.shape != two.shape]
    return {
        "object": [Caption((item,)) for item in (*EXACT, *open_ones)],
        "place": [
            Caption((item,), place=place) for item in (*EXACT, *open_ones, Named(None, None)) for place in PLACES
        ],
        "background": [Caption((item,), background=name) for item in (*EXACT, *open_ones) for name in BACKGROUNDS],
        "count": [Caption((item,) * number) for item in (*EXACT, *open_ones) for number in (2, 3)],
        "pair": [Caption(pair) for pair in pairs],
        "relation": [Caption(pair, relation=relation) for pair in pairs for relation in RELATIONS],
    }


def detailed_captions() -> list[Caption]:
    """Return captions that say place and background, in a fixed order. They leave little open: for training only."""
    return [Caption((item,), place, background) for item, place, background in product(EXACT, PLACES, BACKGROUNDS)]


def draw_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a scene that `caption` is true of. What it leaves open is uniform; places are, among scenes that fit."""
    background = caption.background or pick(rng, BACKGROUNDS)
    while True:
        items = tuple(_draw_item(named, len(caption.items), rng) for named in caption.items)
        if _well_placed(caption, items):
            return Scene(background, items)


def _draw_item(named: Named, number: int, rng: np.random.Generator) -> Item:
    radius = rng.uniform(*RADII[number])
    edge = EXTENT * radius + GAP
    x, y = rng.uniform(edge, SIZE - edge, 2)
    return Item(named.color or pick(rng, COLORS), named.shape or pick(rng, SHAPES), x, y, radius)


def _well_placed(caption: Caption, items: tuple[Item, ...]) -> bool:
    if any(not apart(one, two) for i, one in enumerate(items) for two in items[:i]):
        return False
    if caption.relation:
        return ahead(caption.relation, items[0], items[1]) >= DRAWN_APART
    return caption.place is None or at_place(caption.place, items[0].x, items[0].y, CLEAR)


def ahead(relation: str, one: Item, two: Item) -> float:
    """Return how many pixels `one` is further than `two` in the direction of a relation; negative if it is behind."""
    return {
        "left of": two.x - one.x,
        "right of": one.x - two.x,
        "above": two.y - one.y,
        "below": one.y - two.y,
    }[relation]


def at_place(place: str, x: float, y: float, clear: float) -> bool:
    """Return whether a center is at a place: at least `clear` pixels beyond the middle, or in the center, so near."""
    return {
        "left": x <= MIDDLE - clear,
        "right": x >= MIDDLE + clear,
        "top": y <= MIDDLE - clear,
        "bottom": y >= MIDDLE + clear,
        "center": max(abs(x - MIDDLE), abs(y - MIDDLE)) <= 12.0 - clear / 2,
    }[place]


def alternatives(caption: Caption, part: str) -> list[Caption]:
    """Return the captions that say one part otherwise; none if the caption does not say it.

    Args:
        part: color, shape, place, background, count, relation, or binding (the colors of two shapes exchanged).
    """
    first, *others = caption.items
    if part == "binding":
        if caption.kind not in ("pair", "relation"):
            return []
        swapped = (replace(first, color=others[0].color), replace(others[0], color=first.color))
        return [replace(caption, items=swapped)]
    if part == "count":
        if caption.kind not in ("object", "count"):
            return []
        return [replace(caption, items=(first,) * number) for number in NUMBERS if number != len(caption.items)]
    if part in ("color", "shape"):
        said = getattr(first, part)
        changed = [
            replace(first, **{part: value}) for value in (COLORS if part == "color" else SHAPES) if value != said
        ]
        if said is None:
            return []
        if caption.kind == "count":
            return [replace(caption, items=(item,) * len(caption.items)) for item in changed]
        return [replace(caption, items=(item, *others)) for item in changed]
    values = {"place": PLACES, "background": BACKGROUNDS, "relation": RELATIONS}[part]
    said = getattr(caption, part)
    return [replace(caption, **{part: value}) for value in values if value != said] if said else []


def pick(rng: np.random.Generator, values: Collection[Value]) -> Value:
    """Draw one of these values."""
    return list(values)[int(rng.integers(len(values)))]
