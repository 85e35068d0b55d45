"""Comparing two rounds on the same prompts and seeds, and variety within a prompt."""

from __future__ import annotations

import numpy as np


def win_rate(scores: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs in which `scores` [n] beats `other` [n]; a tie counts half. 0.5 is no difference."""
    return float(np.mean((scores > other) + 0.5 * (scores == other)))


def diversity(features: np.ndarray, groups: list[str]) -> float:
    """Mean cosine distance (0 to 2) between the pictures of one prompt, averaged over prompts.

    Args:
        features: [n, dim].
        groups: the prompt id of each row. Prompts with a single picture do not count; 0.0 if all are such.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    names, distances = np.asarray(groups), []
    for name in dict.fromkeys(groups):
        rows = unit[names == name]
        if len(rows) > 1:
            similarity = (rows @ rows.T).sum() - len(rows)
            distances.append(1 - similarity / (len(rows) * (len(rows) - 1)))
    return float(np.mean(distances)) if distances else 0.0
