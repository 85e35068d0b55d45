"""Early rejection: which candidates go on, which prompts are audited, and what rejecting lost and saved.

No torch in here: selection reads it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from srpo.config.schema import GenerateParams
from srpo.storage.hashing import derive_seed

PREFIX = "rejection_"
AUDITED_COLUMNS = ["prompt_id", "candidate_id", "preview_scores", "stopped_at", "would_stop_at", "audited"]


def survivors(scores: Sequence[float], keep: int) -> list[int]:
    """Positions of the `keep` best scores, in order of position.

    Equals go to the first; NaN and infinity lose against every number.
    """
    ranked = sorted(range(len(scores)), key=lambda i: (not math.isfinite(scores[i]), -_finite(scores[i]), i))
    return sorted(ranked[:keep])


def is_audited(fraction: float, seed: int, key: str, prompt_id: str) -> bool:
    """Whether all candidates of this prompt are finished in this round, so that what rejection loses is measured."""
    return derive_seed(seed, key, "audit", prompt_id) < fraction * 2**63


def audit(candidates: pl.LazyFrame, scores: pl.DataFrame, settings: GenerateParams) -> dict[str, float | int | None]:
    """What early rejection lost and saved in a round, flat; empty when nothing was rejected early.

    Regret is the best final reward of a prompt minus the best that rejection leaves of it, mean over the audited
    prompts; its share is of the best-of-N gain, the best minus the mean, over the same prompts. The rank correlation is
    Spearman's, of preview and final reward within a prompt, mean over the audited prompts. A number that can't be had
    (nothing audited, or all equal) is None.

    Args:
        candidates: the round's whole dataset, of which only the columns needed are read.
        scores: candidate_id, rejected, and the reward that scored the previews.
        settings: of the round; says steps, checkpoints, and the reward.
    """
    rejection = settings.early_rejection
    if rejection is None:
        return {}
    final = pl.col(rejection.reward).cast(pl.Float64).alias("final")
    table = candidates.select(AUDITED_COLUMNS).collect()
    table = table.join(scores.select("candidate_id", "invalid", final), on="candidate_id", how="left")
    audited = table.filter("audited")
    sound = audited.filter(~pl.col("invalid") & pl.col("final").is_finite())
    kept = pl.col("would_stop_at") == settings.num_inference_steps
    prompts = sound.group_by("prompt_id").agg(
        pl.col("final").max().alias("best"),
        pl.col("final").mean().alias("mean"),
        pl.col("final").filter(kept).max().alias("left"),
    )
    # what rejection left of a prompt may hold no sound picture at all; then a winner is lost, not only a better one
    prompts = prompts.with_columns(pl.col("left").fill_null(pl.col("mean")))
    regret, gain = (prompts["best"] - prompts["left"]).mean(), (prompts["best"] - prompts["mean"]).mean()
    full = table.height * settings.num_inference_steps
    unaudited = audited if audited.height == table.height else table.filter(~pl.col("audited"))
    found: dict[str, float | int | None] = {
        "audited_prompts": audited["prompt_id"].n_unique(),
        "regret": regret,
        "gain": gain,
        "regret_share": regret / gain if regret is not None and gain else None,
        "same_best": (prompts["best"] == prompts["left"]).cast(pl.Float64).mean(),
    }
    for number, point in enumerate(rejection.checkpoints):
        found[f"rank_correlation_{point.step}"] = _rank_correlation(sound, number)
    steps_asked = unaudited["would_stop_at"].sum()
    found["unet_evaluations"] = int(table["stopped_at"].sum())
    found["unet_evaluations_share"] = table["stopped_at"].sum() / full
    found["unet_evaluations_share_unaudited"] = steps_asked / (unaudited.height * settings.num_inference_steps)
    return {PREFIX + name: value for name, value in found.items()}


def _rank_correlation(sound: pl.DataFrame, checkpoint: int) -> float | None:
    preview = pl.col("preview_scores").list.get(checkpoint, null_on_oob=True).cast(pl.Float64)
    pairs = sound.with_columns(preview.alias("preview")).filter(pl.col("preview").is_finite())
    by_prompt = pairs.group_by("prompt_id").agg(pl.corr("preview", "final", method="spearman").alias("r"))
    return by_prompt["r"].filter(by_prompt["r"].is_finite()).mean()


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 0.0
