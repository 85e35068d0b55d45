"""Keys of evaluation records, and the reward names that would collide with them or with columns of datasets."""

from __future__ import annotations

from collections.abc import Collection

IMAGE_STATS = ("saturation", "contrast", "edge_density", "color_entropy")
"""Statistics of single images; guidance.csv has `<name>_std` beside each."""

INTERVAL_SUFFIXES = ("_low", "_high")
IMAGE_SET_METRICS = ("fid", "kid", "cmmd", "diversity", "open_diversity")
HEADLINE = ("guidance", "images", *IMAGE_SET_METRICS, "fid_best", "drift", "drift_kid", "verdict", "finding")
"""Keys of metrics.json besides those of rewards."""

HUMAN = "human"
"""Prefix of the keys of votes, beside those of judges: human_win_rate."""

REWARD_SUFFIXES = (
    *INTERVAL_SUFFIXES, "_missing", "_best", "_win_rate", "_win_rate_low", "_win_rate_parent", "_human_agreement"
)  # fmt: skip
"""Suffixes of the keys that an evaluation adds to a reward's name."""

RESERVED_KEYS = frozenset(
    [
        *HEADLINE,
        *(name + suffix for name in IMAGE_SET_METRICS for suffix in INTERVAL_SUFFIXES),
        *(name + suffix for name in IMAGE_STATS for suffix in ("", "_std")),
        *(HUMAN, "human_win_rate", "human_win_rate_low", "human_win_rate_high", "human_votes", "human_alpha"),
        "inception",  # an extractor of features, as judges are
        "file",  # a column of score-images
        *("place", "finished", "winner", "tags", "disagreement"),  # columns of the review pages
    ]
)
"""Keys of every evaluation, whatever its rewards."""


def name_conflict(name: str, rewards: Collection[str]) -> str | None:
    """Return what has the name of the reward `name` already, a column, metric or other reward's metric; else None."""
    from srpo.data.schemas import RESERVED

    if name in RESERVED:
        return "a column of the datasets"
    if name in RESERVED_KEYS:
        return "a metric of every evaluation"
    others = (reward for reward in rewards for suffix in REWARD_SUFFIXES if name == reward + suffix)
    other = next(others, None)
    return f"a metric of reward {other!r}" if other else None
