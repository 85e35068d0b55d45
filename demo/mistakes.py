"""Wrong captions, which teach the base the mistakes that rounds correct."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from demo.captions import NUMBERS, PLACES, RELATIONS, Caption, Named, Value, pick
from demo.scenes import BACKGROUNDS, COLORS, SHAPES

Other = Callable[[Value, Collection[Value], np.random.Generator], Value]
_PAIRS: tuple[tuple[str | int, str | int], ...] = (
    ("red", "orange"), ("yellow", "green"), ("blue", "purple"), ("circle", "square"), ("triangle", "cross"),
    ("left", "right"), ("top", "bottom"), ("white", "grey"), ("left of", "right of"), ("above", "below"), (2, 3),
)  # fmt: skip
CONFUSED = {"black": "white"} | dict(_PAIRS) | {two: one for one, two in _PAIRS}
"""What each value is mistaken for where mistakes always have the same other value. The center is not mistaken."""


def miscaption(caption: Caption, rng: np.random.Generator, wrong: float, other: Other) -> Caption:
    """Return the caption with every part that is said replaced with probability `wrong`, by what `other` returns."""

    def again(value: Value | None, values: Collection[Value]) -> Value | None:
        return other(value, values, rng) if value is not None and rng.random() < wrong else value

    def named(item: Named) -> Named:
        return Named(again(item.color, COLORS), again(item.shape, SHAPES))

    if caption.kind == "count":
        items = (named(caption.items[0]),) * again(len(caption.items), NUMBERS)
        return Caption(items, background=again(caption.background, BACKGROUNDS))
    items = tuple(named(item) for item in caption.items)
    if caption.kind == "pair" and items[0] == items[1]:  # that would be a count
        items = caption.items
    return Caption(
        items, again(caption.place, PLACES), again(caption.background, BACKGROUNDS), again(caption.relation, RELATIONS)
    )


def any_value(value: Value, values: Collection[Value], rng: np.random.Generator) -> Value:
    """Return any of the values: a scattered mistake. Guidance undoes most of what a model learns from those."""
    return pick(rng, values)


def confused_value(value: Value, values: Collection[Value], rng: np.random.Generator) -> Value:
    """Return the value that this one is always mistaken for. Guidance does not undo what a model learns from it."""
    return CONFUSED.get(value, value)  # type: ignore[return-value]
