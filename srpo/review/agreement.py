"""Statistics of human decisions: Krippendorff's alpha, win rates over prompts, agreement with rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from srpo.evaluation.bootstrap import Estimate, mean_interval
from srpo.review.journal import Decision


def krippendorff_alpha(units: Iterable[Iterable[float]]) -> float | None:
    """Return Krippendorff's alpha with the interval metric: 1 is full agreement, 0 is that of chance.

    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): one minus the observed over the expected mean
    squared difference of two ratings.

    Args:
        units: the ratings of each unit, by any number of raters. Units with fewer than two do not count.

    Returns:
        None where it is not defined: no unit has two ratings, or all ratings are equal.
    """
    pairable = [np.asarray(list(unit), np.float64) for unit in units]
    pairable = [unit for unit in pairable if len(unit) > 1]
    if not pairable:
        return None
    # the sum of squared differences over all ordered pairs of n values is 2 n^2 times their variance
    observed = sum(2 * len(unit) ** 2 * unit.var() / (len(unit) - 1) for unit in pairable)
    values = np.concatenate(pairable)
    expected = 2 * len(values) ** 2 * values.var() / (len(values) - 1)
    return float(1 - observed / expected) if expected else None


def human_win_rate(votes: Iterable[Decision]) -> Estimate:
    """Return the share of votes that the round won, an equal vote counting half, with the interval over prompts.

    Args:
        votes: at least one; each with `prompt_id` and `value`, 1 where the round won, 0 where the other did, else 0.5.
    """
    rows = list(votes)
    return mean_interval(np.array([row["value"] for row in rows]), [row["prompt_id"] for row in rows])


def vote_agreement(votes: Iterable[Decision], differences: Mapping[tuple[str, int], float]) -> Estimate | None:
    """Return the share of decided votes whose winner has the higher reward; chance is 0.5, equal rewards count half.

    Args:
        votes: with prompt_id, index and value.
        differences: the round's reward minus the other's, by prompt_id and index.
    """
    agreed, prompts = [], []
    for row in votes:
        difference = differences.get((row["prompt_id"], row["index"]), np.nan)
        if row["value"] != 0.5 and np.isfinite(difference):
            agreed.append(0.5 + 0.5 * np.sign(difference) * (1 if row["value"] == 1 else -1))
            prompts.append(row["prompt_id"])
    return mean_interval(np.array(agreed), prompts) if agreed else None


def pick_agreement(picks: Iterable[Decision], rewards: Mapping[str, float]) -> tuple[Estimate, Estimate] | None:
    """Return how a reward ranks what people picked, with intervals over prompts.

    The first is the share of the other candidates shown that score lower than the picked one, equals counting half
    (chance is 0.5); the second how often the picked one scores highest, shared among equals.

    Args:
        picks: with item (the prompt's id), picked and shown. Those that picked nothing do not count.
        rewards: by candidate_id.
    """
    above, best, prompts = [], [], []
    for pick in picks:
        shown = np.array([rewards.get(row["candidate_id"], np.nan) for row in pick["shown"]])
        own = rewards.get(pick["picked"], np.nan) if pick["picked"] else np.nan
        shown = shown[np.isfinite(shown)]
        if np.isfinite(own) and len(shown) > 1:
            above.append(((shown < own).sum() + 0.5 * ((shown == own).sum() - 1)) / (len(shown) - 1))
            best.append((own == shown.max()) / (shown == shown.max()).sum())
            prompts.append(pick["item"])
    return (mean_interval(np.array(above), prompts), mean_interval(np.array(best), prompts)) if above else None


def same_choice(decisions: Iterable[Decision], field: str) -> tuple[int, float] | None:
    """Return how many pairs of raters decided on the same item, and the share of these with the same choice."""
    by_item: dict[str, list[Any]] = {}
    for decision in decisions:
        by_item.setdefault(decision["item"], []).append(decision[field])
    pairs = [one == other for choices in by_item.values() for one, other in combinations(choices, 2)]
    return (len(pairs), sum(pairs) / len(pairs)) if pairs else None
