"""The gate: whether a round is better than base, by metrics that did not choose its winners.

Fine-tuning on guided samples bakes guidance into a model, so a round's best guidance is lower than base's,
and at any one guidance the two are at different points of their curves. The gate therefore compares each model
at its own best guidance: for a reward, the one with the highest mean of that reward; for metrics of image sets,
the one with the lowest FID.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from srpo.config.schema import GateParams
from srpo.data.metric_keys import IMAGE_STATS
from srpo.evaluation.bootstrap import Estimate

HACKING = "reward hacking"
NO_GAIN = "no better than its parent"
EVEN = 0.5  # the win rate of equal models
Sweep = Mapping[str, Mapping[str, float]]
"""Metrics by guidance scale, as `MetricAccumulator.compute` returns them."""


def best_guidance(sweep: Sweep, name: str) -> str:
    """Return the guidance scale at which a model is best by `name`: the lowest FID, or the highest mean of a reward."""
    if name == "fid":
        return min(sweep, key=lambda guidance: sweep[guidance]["fid"])
    return max(sweep, key=lambda guidance: _or_lowest(sweep[guidance][name]))


def best_of_sweep(sweep: Sweep, rewards: Iterable[str]) -> dict[str, float | None]:
    """Return `<reward>_best` and `fid_best`: a model's numbers at its own best guidance for each."""
    values = {f"{name}_best": sweep[best_guidance(sweep, name)][name] for name in (*rewards, "fid")}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def image_stat_shifts(sweep: Sweep, base: Sweep) -> dict[str, dict[str, float]]:
    """Return by statistic of `IMAGE_STATS`: `round` and `base` (means), `base_std` (over images), and the shift `z`.

    z is (round - base) / base_std, each model at its best FID.
    """
    tuned = sweep[best_guidance(sweep, "fid")]
    untuned = base[best_guidance(base, "fid")]
    return {
        name: {
            "round": tuned[name],
            "base": untuned[name],
            "base_std": untuned[f"{name}_std"],
            "z": (tuned[name] - untuned[name]) / max(untuned[f"{name}_std"], 1e-12),
        }
        for name in IMAGE_STATS
    }


def judge_round(
    settings: GateParams,
    sweep: Sweep,
    base: Sweep,
    judges: Mapping[str, Estimate],
    selects: Mapping[str, Estimate],
    missing: Mapping[str, float] | None = None,
    over_parent: Mapping[str, Estimate] | None = None,
    human: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the gate's `verdict` (pass or fail), `finding` (HACKING, NO_GAIN or None) and `rules`.

    NO_GAIN does not fail a round: no judge's win rate over the parent is above 0.5 with its whole interval.

    A rule has `value`, `sense` (at least or at most), `limit` and `passed`. Rules whose limit is null in params are
    left out.

    Args:
        settings: the limits.
        sweep: the round's.
        base: base's.
        judges: win rate over base by judge, each model at its best guidance, with its interval.
        selects: the same for the rewards that chose the winners.
        missing: share of scores that are NaN or infinite, for the judges that have any.
        over_parent: win rate over the parent by judge, each model at its best guidance.
        human: what people voted: `votes`, their number, and `win_rate` over base with `low`; None without votes.
    """
    tuned = sweep[best_guidance(sweep, "fid")]
    untuned = base[best_guidance(base, "fid")]
    rules = {f"{name}_win_rate": _at_least(rate.low, settings.min_judge_win_rate) for name, rate in judges.items()}
    if human and settings.min_human_win_rate is not None and human["votes"] >= settings.min_human_votes:
        rules["human_win_rate"] = _at_least(human["win_rate"]["low"], settings.min_human_win_rate)
    rules["fid_ratio"] = _at_most(tuned["fid"] / max(untuned["fid"], 1e-12), settings.max_fid_ratio)
    if settings.max_kid_increase is not None:
        rules["kid_increase"] = _at_most(tuned["kid"] - untuned["kid"], settings.max_kid_increase)
    kind = "open_diversity" if "open_diversity" in tuned and "open_diversity" in untuned else "diversity"
    if kind in tuned and kind in untuned:  # it needs two images per prompt
        ratio = tuned[kind] / max(untuned[kind], 1e-12)
        rules[f"{kind}_ratio"] = _at_least(ratio, settings.min_diversity_ratio)
    if settings.max_image_stat_shift is not None:
        for name, shift in image_stat_shifts(sweep, base).items():
            rules[f"{name}_shift"] = _at_most(abs(shift["z"]), settings.max_image_stat_shift)
    for name, share in (missing or {}).items():
        rules[f"{name}_missing"] = _at_most(share, settings.max_missing_scores)
    rules["unbacked_reward"] = _at_most(unbacked_gain(judges, selects), 0.0)
    finding = None if rules["unbacked_reward"]["passed"] else HACKING
    if not finding and over_parent and all(rate.low <= EVEN for rate in over_parent.values()):
        finding = NO_GAIN
    return {
        "verdict": "pass" if all(rule["passed"] for rule in rules.values()) else "fail",
        "finding": finding,
        "rules": rules,
    }


def unbacked_gain(judges: Mapping[str, Estimate], selects: Mapping[str, Estimate]) -> float:
    """Return how far the lower end of a selecting reward's win rate is above 0.5 if no judge confirms it, else 0.

    Judges confirm it if the interval of at least one is above 0.5 and that of none is below.
    """
    gain = max(0.0, *(rate.low - EVEN for rate in selects.values()))
    rise = any(rate.low > EVEN for rate in judges.values())
    fall = any(rate.high < EVEN for rate in judges.values())
    return 0.0 if rise and not fall else gain


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _at_least(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "sense": "at least", "limit": limit, "passed": value >= limit}


def _at_most(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "sense": "at most", "limit": limit, "passed": value <= limit}
