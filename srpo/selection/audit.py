"""Rules of early rejection: surviving candidates, audited prompts, and the audit of its costs and savings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from srpo.config.schema import GenerateParams
from srpo.storage.hashing import derive_seed

PREFIX = "rejection_"
AUDITED_COLUMNS = ["prompt_id", "candidate_id", "preview_scores", "stopped_at", "would_stop_at", "audited"]


def survivors(scores: Sequence[float], keep: int) -> list[int]:
    """Return the positions of the `keep` best scores, ascending.

    Among equal scores the first wins; NaN and infinity rank last.
    """
    ranked = sorted(range(len(scores)), key=lambda i: (not math.isfinite(scores[i]), -_finite(scores[i]), i))
    return sorted(ranked[:keep])


def is_audited(fraction: float, seed: int, key: str, prompt_id: str) -> bool:
    """Return whether this round finishes all candidates of this prompt, so that the loss of rejection is measured."""
    return derive_seed(seed, key, "audit", prompt_id) < fraction * 2**63


def audit(candidates: pl.LazyFrame, scores: pl.DataFrame, settings: GenerateParams) -> dict[str, float | int | None]:
    """Return the costs and savings of early rejection in a round as flat numbers; empty if it is off.

    Regret is the best final reward of a prompt minus the best that remains after rejection, averaged over the audited
    prompts; `regret_share` divides it by the best-of-N gain (best minus mean) of the same prompts. The rank correlation
    is Spearman's, of preview and final reward within a prompt, averaged over the audited prompts. A number that is
    undefined (nothing audited, or all values equal) is None.

    Args:
        candidates: the round's candidates, with AUDITED_COLUMNS.
        scores: candidate_id, invalid, and the reward that scored the previews.
        settings: steps, checkpoints and reward of the round.
    """
    rejection = settings.early_rejection
    if rejection is None:
        return {}
    final = pl.col(rejection.reward).cast(pl.Float64).alias("final")
    table = candidates.select(AUDITED_COLUMNS).collect()
    table = table.join(scores.select("candidate_id", "invalid", final), on="candidate_id", how="left")
    audited = table.filter("audited")
    valid = audited.filter(~pl.col("invalid") & pl.col("final").is_finite())
    kept = pl.col("would_stop_at") == settings.num_inference_steps
    prompts = valid.group_by("prompt_id").agg(
        pl.col("final").max().alias("best"),
        pl.col("final").mean().alias("mean"),
        pl.col("final").filter(kept).max().alias("left"),
    )
    # if no valid candidate of a prompt remains, its winner is lost, not only a better one
    prompts = prompts.with_columns(pl.col("left").fill_null(pl.col("mean")))
    regret = _mean(prompts["best"] - prompts["left"])
    gain = _mean(prompts["best"] - prompts["mean"])
    full = table.height * settings.num_inference_steps
    unaudited = audited if audited.height == table.height else table.filter(~pl.col("audited"))
    numbers: dict[str, float | int | None] = {
        "audited_prompts": audited["prompt_id"].n_unique(),
        "regret": regret,
        "gain": gain,
        "regret_share": regret / gain if regret is not None and gain else None,
        "same_best": _mean(prompts["best"] == prompts["left"]),
    }
    for number, point in enumerate(rejection.checkpoints):
        numbers[f"rank_correlation_{point.step}"] = _rank_correlation(valid, number)
    steps = int(table["stopped_at"].sum())
    numbers["unet_evaluations"] = steps
    numbers["unet_evaluations_share"] = steps / full
    numbers["unet_evaluations_share_unaudited"] = int(unaudited["would_stop_at"].sum()) / (
        unaudited.height * settings.num_inference_steps
    )
    return {PREFIX + name: value for name, value in numbers.items()}


def _rank_correlation(valid: pl.DataFrame, checkpoint: int) -> float | None:
    preview = pl.col("preview_scores").list.get(checkpoint, null_on_oob=True).cast(pl.Float64)
    pairs = valid.with_columns(preview.alias("preview")).filter(pl.col("preview").is_finite())
    by_prompt = pairs.group_by("prompt_id").agg(pl.corr("preview", "final", method="spearman").alias("r"))
    return _mean(by_prompt["r"].filter(by_prompt["r"].is_finite()))


def _mean(values: pl.Series) -> float | None:
    mean = values.cast(pl.Float64).mean()
    return float(mean) if isinstance(mean, float) else None


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 0.0
