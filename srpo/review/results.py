"""The results of a review as tables, for the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from srpo.data.scores import read_scores
from srpo.evaluation.bootstrap import Estimate
from srpo.review.agreement import human_win_rate, pick_agreement, same_choice, vote_agreement
from srpo.review.candidates import picks_dataset
from srpo.review.journal import Decision, Journal
from srpo.review.votes import alpha, by_pair, current_votes, reward_differences
from srpo.rounds import BASE, Round


@dataclass
class Table:
    """A table of texts with a title above it and a note below."""

    title: str
    note: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def results(round: Round) -> list[Table]:
    """Return what people decided about this round: votes against each other model, then picks.

    Raises:
        UserError: a journal or a file of the round is damaged.
    """
    votes = Journal(round.root, round.key, "votes").decisions()
    tables = []
    for against in dict.fromkeys(row["against"] for row in votes):
        tables += vote_tables(round, against, [row for row in votes if row["against"] == against])
    if not votes:
        tables.append(Table("Votes", "Nobody has compared this round with another yet."))
    return [*tables, *pick_tables(round)]


def vote_tables(round: Round, against: str, votes: list[Decision]) -> list[Table]:
    """Return the win rate of the round over another model, and the agreement of the voters with each reward.

    Votes about other images than the evaluations hold now do not count.
    """
    current = current_votes(round, against, votes)
    outdated = f" {len(votes) - len(current)} votes about images of earlier evaluations do not count."
    outdated *= len(current) < len(votes)
    title = f"Round {round.key} against {against}"
    if not current:
        return [Table(title, f"No vote about the images that the evaluations hold now.{outdated}")]
    raters = sorted({row["rater"] for row in current})
    rows = [_win_row(name, [row for row in current if row["rater"] == name]) for name in raters]
    if len(raters) > 1:
        rows.append(_win_row("all", current))
    shared = sum(len(values) > 1 for values in by_pair(current).values())
    agreement = "Krippendorff's alpha needs several raters, and votes that differ."
    if (found_alpha := alpha(current)) is not None:
        agreement = (
            f"Krippendorff's alpha is {found_alpha:.2f} over {shared} pairs of several raters"
            " (1: all agree, 0: chance)."
        )
    frozen = f" They count in the gate after `srpo votes {round.key} --freeze`." * (against == BASE)
    note = (
        "Win rate: an equal vote counts half, 95 % interval over prompts; 0.5 is no difference."
        f" {agreement}{outdated}{frozen}"
    )
    tables = [Table(title, note, ["rater", "win rate", "votes", "prompts", "equal", "left"], rows)]
    differences = reward_differences(round, against)
    found = {name: vote_agreement(current, differences.get(name, {})) for name in round.params.rewards}
    rows = [[name, round.params.rewards[name].role, _interval(value)] for name, value in found.items()]
    note = "Share of decided votes whose winner has the higher reward, 95 % interval over prompts; chance is 0.5."
    return [*tables, Table(f"Rewards and votes against {against}", note, ["reward", "role", "agrees"], rows)]


def pick_tables(round: Round) -> list[Table]:
    """Return what was picked, and how each reward ranks it."""
    every = Journal(round.root, round.key, "picks").decisions()
    picks = [row for row in every if row["dataset"] == picks_dataset(round)]
    outdated = f" {len(every) - len(picks)} picks of earlier candidates do not count." * (len(picks) < len(every))
    if not picks:
        return [Table("Picks", f"Nobody has picked winners of this round yet.{outdated}")]
    raters = sorted({row["rater"] for row in picks})
    rows = []
    for name in raters:
        own = [row for row in picks if row["rater"] == name]
        rows.append(
            [name, str(len(own)), str(sum(row["picked"] is None for row in own)), f"{_median_seconds(own):.1f}"]
        )
    pairs = same_choice(picks, "picked")
    note = f"{pairs[0]} pairs of raters met at the same prompt; {pairs[1]:.0%} chose the same." if pairs else ""
    note = f"{note}{outdated}".strip()
    tables = [Table("Picks", note, ["rater", "prompts", "all bad", "seconds"], rows)]
    if not round.files.scores.exists():
        return tables
    scores = read_scores(round.files.scores, {name: spec.role for name, spec in round.params.rewards.items()})
    shown = {row["candidate_id"] for pick in picks for row in pick["shown"]}
    scores = scores.filter(pl.col("candidate_id").is_in(shown))
    rows = []
    for name, spec in round.params.rewards.items():
        values = {key: float("nan") if v is None else v for key, v in scores.select("candidate_id", name).iter_rows()}
        found = pick_agreement(picks, values)
        above, best = found or (None, None)
        rows.append([name, spec.role, _interval(above), _interval(best)])
    chance = sum(1 / len(pick["shown"]) for pick in picks) / len(picks)
    note = (
        "Above others: share of the other candidates that score lower than the picked one; chance is 0.5."
        f" Same best: how often the picked one scores highest; chance is {chance:.2f}. 95 % intervals over prompts."
    )
    return [*tables, Table("Rewards and picks", note, ["reward", "role", "above others", "same best"], rows)]


def _win_row(name: str, votes: list[Decision]) -> list[str]:
    decided = [row for row in votes if row["choice"] != "equal"]
    left = sum(row["choice"] == "left" for row in decided) / len(decided) if decided else None
    prompts = len({row["prompt_id"] for row in votes})
    return [
        name,
        _interval(human_win_rate(votes)),
        str(len(votes)),
        str(prompts),
        f"{1 - len(decided) / len(votes):.0%}",
        "-" if left is None else f"{left:.0%}",
    ]


def _interval(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _median_seconds(decisions: list[Decision]) -> float:
    ordered = sorted(row["seconds"] for row in decisions)
    return ordered[len(ordered) // 2]
