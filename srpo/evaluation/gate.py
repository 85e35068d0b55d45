"""Whether a round is better than base, by measures that did not choose its winners.

Fine-tuning on guided samples bakes guidance into a model, so a round's best guidance is lower than base's,
and at any one guidance the two are at different places of their curves. Everything here therefore compares
each model at its own best guidance: for a reward, the one with the highest mean of that reward; for measures
of sets of pictures, the one with the lowest FID.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srpo.config.schema import GateParams
from srpo.evaluation.bootstrap import Estimate
from srpo.evaluation.image_stats import IMAGE_STATS

HACKING = "reward hacking"
EVEN = 0.5  # the win rate of a model against its equal
Sweep = Mapping[str, Mapping[str, float]]
"""Measures by guidance scale, as `Observation.measures` gives them."""


def best_guidance(sweep: Sweep, name: str) -> str:
    """The guidance scale at which a model is best by `name`: the lowest FID, or the highest mean of a reward."""
    if name == "fid":
        return min(sweep, key=lambda guidance: sweep[guidance]["fid"])
    return max(sweep, key=lambda guidance: sweep[guidance][name])


def image_stat_shifts(sweep: Sweep, base: Sweep) -> dict[str, dict[str, float]]:
    """By statistic of `IMAGE_STATS`: `round` and `base` (means), `base_std` (over pictures), and `z`, the drift.

    z is (round - base) / base_std, at each side's best FID.
    """
    ours, theirs = sweep[best_guidance(sweep, "fid")], base[best_guidance(base, "fid")]
    return {
        name: {
            "round": ours[name],
            "base": theirs[name],
            "base_std": theirs[f"{name}_std"],
            "z": (ours[name] - theirs[name]) / max(theirs[f"{name}_std"], 1e-12),
        }
        for name in IMAGE_STATS
    }


def judge_round(
    settings: GateParams,
    sweep: Sweep,
    base: Sweep,
    judges: Mapping[str, Estimate],
    selects: Mapping[str, Estimate],
) -> dict[str, Any]:
    """The gate's `verdict` (pass or fail), `finding` (reward hacking or None) and `rules`.

    A rule has `value`, `sense` (at least or at most), `limit` and `passed`. One whose limit is null in params
    is left out.

    Args:
        settings: the limits.
        sweep: the round's.
        base: base's.
        judges: win rate over base by judge, at each side's best guidance, with its interval.
        selects: the same for the rewards that chose the winners.
    """
    ours, theirs = sweep[best_guidance(sweep, "fid")], base[best_guidance(base, "fid")]
    rules = {f"{name}_win_rate": _at_least(rate.low, settings.min_judge_win_rate) for name, rate in judges.items()}
    rules["fid_ratio"] = _at_most(ours["fid"] / max(theirs["fid"], 1e-12), settings.max_fid_ratio)
    if settings.max_kid_increase is not None:
        rules["kid_increase"] = _at_most(ours["kid"] - theirs["kid"], settings.max_kid_increase)
    kept = ours["diversity"] / max(theirs["diversity"], 1e-12)
    rules["diversity_ratio"] = _at_least(kept, settings.min_diversity_ratio)
    if settings.max_image_stat_shift is not None:
        for name, look in image_stat_shifts(sweep, base).items():
            rules[f"{name}_shift"] = _at_most(abs(look["z"]), settings.max_image_stat_shift)
    rules["unbacked_reward"] = _at_most(unbacked_gain(judges, selects), 0.0)
    return {
        "verdict": "pass" if all(rule["passed"] for rule in rules.values()) else "fail",
        "finding": None if rules["unbacked_reward"]["passed"] else HACKING,
        "rules": rules,
    }


def unbacked_gain(judges: Mapping[str, Estimate], selects: Mapping[str, Estimate]) -> float:
    """By how much the selecting reward's win rate is surely above even, when no judge backs that; else 0.

    Judges back it when at least one is surely above even and none is surely below.
    """
    gain = max(0.0, *(rate.low - EVEN for rate in selects.values()))
    rise = any(rate.low > EVEN for rate in judges.values())
    fall = any(rate.high < EVEN for rate in judges.values())
    return 0.0 if rise and not fall else gain


def _at_least(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "sense": "at least", "limit": limit, "passed": value >= limit}


def _at_most(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "sense": "at most", "limit": limit, "passed": value <= limit}
