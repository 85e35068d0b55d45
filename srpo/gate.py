"""Whether a round is better than base, by measures that did not choose its winners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srpo.params import GateParams


def check_gate(
    settings: GateParams,
    metrics: Mapping[str, Any],
    base: Mapping[str, Any],
    best_win_rate: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """The gate's rules by name, each with `value`, `limit` and `passed`.

    A round bakes guidance into the model, so its best guidance is lower than base's. FID is therefore
    compared at each side's best of the sweep, and so is every judge's win rate.

    Args:
        metrics: the round's, with `sweep` and `diversity`.
        base: base's.
        best_win_rate: by judge, at each side's best guidance, pairwise on the same prompts and seeds.
    """
    rules = {}
    for judge, rate in best_win_rate.items():
        limit = settings.min_judge_win_rate
        rules[f"{judge}_win_rate"] = {"value": rate, "limit": limit, "passed": rate >= limit}
    ratio = _best_fid(metrics) / max(_best_fid(base), 1e-12)
    rules["fid_ratio"] = {
        "value": ratio,
        "limit": settings.max_fid_ratio,
        "passed": ratio <= settings.max_fid_ratio,
    }
    kept = metrics["diversity"] / max(base["diversity"], 1e-12)
    limit = settings.min_diversity_ratio
    rules["diversity_ratio"] = {"value": kept, "limit": limit, "passed": kept >= limit}
    return rules


def _best_fid(metrics: Mapping[str, Any]) -> float:
    return min(row["fid"] for row in metrics["sweep"].values())
