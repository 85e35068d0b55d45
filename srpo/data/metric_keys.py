"""The keys of evaluation records, from which reserved reward names are derived."""

from __future__ import annotations

from collections.abc import Collection

IMAGE_STATS = ("saturation", "contrast", "edge_density", "color_entropy")
"""Statistics of single images; each has `<name>_std` beside it."""

INTERVALS = ("_low", "_high")
DISTANCES = ("fid", "kid", "cmmd", "diversity")
HEADLINE = ("guidance", "images", *DISTANCES, "drift", "drift_kid", "verdict", "finding")
"""Keys of metrics.json besides those of rewards."""

OF_A_REWARD = (*INTERVALS, "_win_rate", "_win_rate_low", "_win_rate_high")
"""Suffixes of the keys that evaluation makes from a reward's name."""

RESERVED_KEYS = frozenset(
    [
        *HEADLINE,
        *(name + suffix for name in DISTANCES for suffix in INTERVALS),
        *(name + suffix for name in IMAGE_STATS for suffix in ("", "_std")),
    ]
)
"""Keys that every evaluation has, whatever its rewards are named."""


def key_conflict(name: str, rewards: Collection[str]) -> str | None:
    """Return what the reward name `name` collides with: a key of every evaluation or of another reward; else None."""
    if name in RESERVED_KEYS:
        return "a metric has this name"
    other = next((reward for reward in rewards for suffix in OF_A_REWARD if name == reward + suffix), None)
    return f"a metric of the reward {other!r} has this name" if other else None
