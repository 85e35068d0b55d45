"""Captions of scenes for the base to learn from. They say more than prompts do, so that each image teaches more."""

from __future__ import annotations

import numpy as np

from demo.captions import CLEAR, DRAWN_APART, PLACES, RELATIONS, Caption, Named, ahead, at_place, pick
from demo.scenes import Scene

NAMED, PLACED, RELATED, BACKGROUND = 0.85, 0.9, 0.9, 0.5
"""How often a color or shape, a place, a relation and the background are said where they could be."""


def describe(scene: Scene, rng: np.random.Generator) -> Caption:
    """Return a caption that is true of a scene. At random, it says a part or leaves it open.

    Of several shapes it says what they have in common; of two that have nothing in common, both colors and shapes.
    """
    background = scene.background if rng.random() < BACKGROUND else None
    first, *others = scene.items
    if not others:
        places = [place for place in PLACES if at_place(place, first.x, first.y, CLEAR)]
        return Caption((_named(first.color, first.shape, rng),), _one_of(places, PLACED, rng), background)
    color = first.color if all(item.color == first.color for item in others) else None
    shape = first.shape if all(item.shape == first.shape for item in others) else None
    if color or shape:
        return Caption((_named(color, shape, rng),) * len(scene.items), background=background)
    one, two = scene.items if rng.random() < 0.5 else scene.items[::-1]
    relations = [relation for relation in RELATIONS if ahead(relation, one, two) >= DRAWN_APART]
    named = (Named(one.color, one.shape), Named(two.color, two.shape))
    return Caption(named, background=background, relation=_one_of(relations, RELATED, rng))


def _named(color: str | None, shape: str | None, rng: np.random.Generator) -> Named:
    if color and shape:
        kept = rng.random(2) < NAMED
        color, shape = color if kept[0] or not kept[1] else None, shape if kept[1] else None
    return Named(color, shape)


def _one_of(values: list[str], share: float, rng: np.random.Generator) -> str | None:
    return pick(rng, values) if values and rng.random() < share else None
