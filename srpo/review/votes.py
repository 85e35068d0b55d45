"""Votes of people that count in the gate: which they are, and what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from srpo.data.eval_scores import at_guidance, read_eval_scores
from srpo.errors import UserError
from srpo.review.agreement import human_win_rate, krippendorff_alpha, vote_agreement
from srpo.review.journal import Decision
from srpo.review.pairs import votes_dataset
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.named_by_hash import read_rows

STEM = "votes"
Differences = Mapping[str, Mapping[tuple[str, int], float]]
"""By reward: the round's minus the other model's, by prompt_id and index."""


def current_votes(round: Round, against: str, votes: Iterable[Decision]) -> list[Decision]:
    """Return the votes against this model about the images that the evaluations hold now.

    Each has a `value`: 1 where the round won, 0 where the other did, 0.5 where they are equal.
    """
    dataset = votes_dataset(round, against)
    return [
        row | {"value": 0.5 if row["winner"] is None else float(row["winner"] == round.key)}
        for row in votes
        if row["against"] == against and row["dataset"] == dataset
    ]


def frozen_votes(round: Round) -> list[Decision]:
    """Return the votes against base that `gate.votes` names for this round; none if it names no file.

    Raises:
        UserError: no such file, not the content that its name says, or votes about other images.
    """
    name = round.params.gate.votes.get(round.key)
    if name is None:
        return []
    param, command = f"gate.votes.{round.key}", f"srpo votes {round.key} --freeze"
    votes = read_rows(round.root / name, STEM, param, command)
    dataset = votes_dataset(round, BASE)
    if any(row["dataset"] != dataset for row in votes):
        raise UserError(
            f"{param}: {name}: votes about other images than the evaluations hold; compare again with"
            f" `srpo review {round.key}`, or remove this key"
        )
    return votes


def human_record(votes: list[Decision], differences: Differences) -> dict[str, Any] | None:
    """Return what gate.json says about people; None without votes.

    `votes`, `prompts` and `raters` are counts; `win_rate` has value, low and high; `alpha` is Krippendorff's, or None;
    `agreement` has by reward value, low and high of its agreement with decided votes, or None.
    """
    if not votes:
        return None
    agreement = {name: vote_agreement(votes, values) for name, values in differences.items()}
    return {
        "votes": len(votes),
        "prompts": len({row["prompt_id"] for row in votes}),
        "raters": len({row["rater"] for row in votes}),
        "win_rate": human_win_rate(votes)._asdict(),
        "alpha": alpha(votes),
        "agreement": {name: found and found._asdict() for name, found in agreement.items()},
    }


def alpha(votes: Iterable[Decision]) -> float | None:
    """Return Krippendorff's alpha of the raters over loss, equal and win; None where it is not defined."""
    return krippendorff_alpha(by_pair(votes).values())


def by_pair(votes: Iterable[Decision]) -> dict[tuple[str, int], list[float]]:
    """Return the values of the votes about each pair of images."""
    values: dict[tuple[str, int], list[float]] = {}
    for row in votes:
        values.setdefault((row["prompt_id"], row["index"]), []).append(row["value"])
    return values


def reward_differences(round: Round, against: str) -> Differences:
    """Return each reward's differences at the guidance of the samples, which is the reported one."""
    tables = []
    for key in (round.key, against):
        scores = read_eval_scores(RoundFiles(round.root, key), round.params.rewards)
        tables.append(at_guidance(scores, round.params.evaluate.guidance_scale))
    both = tables[0].join(tables[1], on=["prompt_id", "index"], suffix="_other")
    return {
        name: {(row[0], row[1]): row[2] for row in both.select("prompt_id", "index", difference).iter_rows()}
        for name in round.params.rewards
        for difference in [(pl.col(name) - pl.col(f"{name}_other")).fill_null(float("nan"))]
    }
