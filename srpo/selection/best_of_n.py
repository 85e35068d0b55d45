"""Best-of-N selection: each prompt's winner by its candidates' scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import polars as pl

from srpo.config.schema import SelectParams
from srpo.storage.hashing import derive_seed

# numbers in place of ids: millions of strings would fill the memory
ROW = "_row"
PROMPT = "_prompt"
NOISE = "_noise"


def choose_winners(
    scores: pl.DataFrame | pl.LazyFrame, weights: Mapping[str, float], settings: SelectParams, seed: int = 0
) -> pl.DataFrame:
    """Return one row per kept prompt: the scores of its winner, in prompt order.

    The winner is the best candidate, or with a `temperature` T one drawn with probability proportional to
    exp(score / T) (the optimum of reward under a KL penalty: Liu et al., Statistical Rejection Sampling Improves
    Preference Optimization, 2023). A draw depends only on the seed and the candidate's id (Gumbel-max).

    The selection score is the reward itself if one reward selects; several rewards are combined by `settings.combine`.
    Ties go to the lowest index. A candidate with a null, NaN or infinite selecting reward can't win and does not count
    in its prompt's means and ranks. A reward that is constant for a prompt does not affect its selection.

    Args:
        scores: columns prompt_id, candidate_id, index and the rewards, in any order of rows.
        weights: by name of the selecting rewards.
        seed: of the draws.
        settings: `min_margin` drops prompts whose winner has a smaller margin; then `top_fraction` keeps the
            prompts with the largest margins (at least one).

    Returns:
        The columns of `scores`, and selection_score, margin (winner minus its prompt's mean), loser_id (the worst
        candidate) and weight: 1, or with `weighting: advantage` the margin over the mean of the kept margins.
    """
    rows = scores.lazy().with_row_index(ROW)
    noise = [_gumbel(seed).alias(NOISE)] if settings.temperature else []
    usable = (
        rows.filter(pl.all_horizontal(pl.col(list(weights)).is_finite()))
        .select(ROW, pl.col("prompt_id").cast(pl.Categorical).to_physical().alias(PROMPT), "index", *weights, *noise)
        .collect(engine="streaming")
        # means are summed in this order, whatever the order of the file; the first of the best is the winner
        .sort(PROMPT, "index", maintain_order=True)
    )
    score = pl.col("selection_score")
    ranked = usable.with_columns(
        selection_score(weights, settings.combine).alias("selection_score"),
        _eligible(weights, settings.combine).alias("eligible"),
    ).select(ROW, PROMPT, "selection_score", "eligible", *([NOISE] if noise else []))
    del usable
    drawn = score / settings.temperature + pl.col(NOISE) if noise else score
    prompts = ranked.group_by(PROMPT, maintain_order=True).agg(
        score.mean().alias("mean"), pl.col(ROW).filter(score == score.min()).last().alias("_loser")
    )
    best = (
        ranked.filter("eligible")
        .group_by(PROMPT, maintain_order=True)
        .agg(pl.col(ROW).get(drawn.arg_max()), score.get(drawn.arg_max()))
        .join(prompts, on=PROMPT)
        .select(ROW, "selection_score", (score - pl.col("mean")).alias("margin"), "_loser")
        .filter(pl.col("margin") >= settings.min_margin)
    )
    del ranked, prompts
    losers = rows.select(_loser=ROW, loser_id="candidate_id")
    winners = rows.join(best.lazy(), on=ROW).join(losers, on="_loser").drop(ROW, "_loser").collect(engine="streaming")
    keep = max(1, round(settings.top_fraction * winners.height))
    kept = winners.sort(["margin", "prompt_id"], descending=[True, False]).head(keep).sort("prompt_id")
    return kept.with_columns(_weight(kept, settings.weighting).alias("weight"))


def _gumbel(seed: int) -> pl.Expr:
    """Return one number of the standard Gumbel distribution per candidate."""

    def number(candidate_id: str) -> float:
        uniform = ((derive_seed(seed, "select", candidate_id) >> 11) + 0.5) / 2.0**52  # never 0 or 1
        return -math.log(-math.log(uniform))

    return pl.col("candidate_id").map_elements(number, return_dtype=pl.Float64)


def odd_scores(scores: pl.DataFrame | pl.LazyFrame, weights: Mapping[str, float]) -> dict[str, int]:
    """Count unusable scores by selecting reward.

    `not_finite_<name>` counts scores that are NaN or infinite, `constant_prompts_<name>` prompts whose finite scores
    are all equal. Null scores are not counted.
    """
    finite = {name: pl.col(name).filter(pl.col(name).is_finite()) for name in weights}
    prompts = (
        scores.lazy()
        .group_by("prompt_id")
        .agg(
            *(pl.col(name).is_finite().not_().sum().alias(f"not_finite_{name}") for name in weights),
            # a single candidate is no evidence
            *(
                ((column.len() > 1) & (column.min() == column.max())).alias(f"constant_prompts_{name}")
                for name, column in finite.items()
            ),
        )
    )
    return prompts.drop("prompt_id").sum().collect(engine="streaming").row(0, named=True)


def _weight(winners: pl.DataFrame, weighting: str) -> pl.Expr:
    # all margins are zero
    if weighting == "uniform" or not winners["margin"].sum():
        return pl.lit(1.0)
    return pl.col("margin") / pl.col("margin").mean()


def selection_score(weights: Mapping[str, float], combine: str) -> pl.Expr:
    """Return the selection score of rows whose prompt is in the column `PROMPT`, as `choose_winners` uses it."""
    if len(weights) == 1:
        return pl.col(next(iter(weights))).cast(pl.Float64)
    if combine == "rank":
        ranks = (weight * _rank(name) for name, weight in weights.items())
        return sum(ranks, start=pl.lit(0.0)) / sum(weights.values())
    return sum((weight * _z_score(name) for name, weight in weights.items()), start=pl.lit(0.0))


def _z_score(name: str) -> pl.Expr:
    column = pl.col(name).cast(pl.Float64)
    z = (column - column.mean().over(PROMPT)) / column.std(ddof=0).over(PROMPT)
    return pl.when(_constant(name)).then(0.0).otherwise(z)


def _rank(name: str) -> pl.Expr:
    """Return 0 for the worst of the prompt, 1 for the best; equal scores share their mean rank."""
    rank = (pl.col(name).rank("average").over(PROMPT) - 1) / (pl.len().over(PROMPT) - 1)
    return pl.when(_constant(name)).then(0.5).otherwise(rank)


def _eligible(weights: Mapping[str, float], combine: str) -> pl.Expr:
    if combine != "beats_mean" or len(weights) == 1:
        return pl.lit(True)
    columns = {name: pl.col(name).cast(pl.Float64) for name in weights}
    return pl.all_horizontal(
        _constant(name) | (column > column.mean().over(PROMPT)) for name, column in columns.items()
    )


def _constant(name: str) -> pl.Expr:
    return pl.col(name).max().over(PROMPT) == pl.col(name).min().over(PROMPT)
