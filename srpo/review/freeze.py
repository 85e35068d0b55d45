"""Files that stages read of what people decided: one choice a prompt from the picks, and the votes against base."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from srpo.errors import UserError
from srpo.review.candidates import picks_dataset
from srpo.review.journal import FOLDER, Journal
from srpo.review.votes import STEM, current_votes
from srpo.rounds import BASE, Round
from srpo.selection.picks import Pick, check_images, write_picks
from srpo.storage.named_by_hash import write_rows


@dataclass(frozen=True)
class Frozen:
    """The file written, and how many prompts have a pick, only bad candidates, or raters who are divided."""

    path: Path
    picked: int
    all_bad: int
    divided: int


def freeze_picks(round: Round) -> Frozen:
    """Write `review/<round>/picks-<hash>.jsonl` for `select`: the choice that most raters made, by prompt.

    Where two choices have equally many raters the prompt is left to the rewards.

    Raises:
        UserError: there are no picks, or they are of other images than the candidates.
    """
    every = Journal(round.root, round.key, "picks").decisions()
    current = [row for row in every if row["dataset"] == picks_dataset(round)]
    if not current:
        found = f"{len(every)} picks, all of earlier candidates" if every else "no picks yet"
        raise UserError(f"{FOLDER}/{round.key}/picks: {found}; `srpo review {round.key}` is the page for them")
    choices: dict[str, list[tuple[str | None, str | None, str]]] = {}
    for row in current:
        image = next((shown["image"] for shown in row["shown"] if shown["candidate_id"] == row["picked"]), None)
        choices.setdefault(row["item"], []).append((row["picked"], image, row["rater"]))
    picks, divided = [], 0
    for prompt_id, rows in choices.items():
        ranked = Counter((picked, image) for picked, image, _ in rows).most_common(2)
        if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
            divided += 1
        else:
            (picked, image), _ = ranked[0]
            picks.append(
                Pick(prompt_id, picked, image, sorted(rater for *choice, rater in rows if choice[0] == picked))
            )
    check_images({pick.prompt_id: pick for pick in picks}, round.files.candidates)
    path = write_picks(round.root / FOLDER / round.key, picks)
    bad = sum(pick.picked is None for pick in picks)
    return Frozen(path, len(picks) - bad, bad, divided)


def freeze_votes(round: Round) -> tuple[Path, int]:
    """Write `review/<round>/votes-<hash>.jsonl` for the gate: all votes against base. Return its path and their number.

    Raises:
        UserError: there are no votes against base about the images that the evaluations hold now.
    """
    every = Journal(round.root, round.key, "votes").decisions()
    votes = current_votes(round, BASE, every)
    if not votes:
        found = f"{len(every)} votes, none of them against base about its images of now" if every else "no votes yet"
        raise UserError(f"{FOLDER}/{round.key}/votes: {found}; `srpo review {round.key}` is the page for them")
    columns = ("prompt_id", "index", "rater", "value", "dataset")
    rows = sorted(({name: row[name] for name in columns} for row in votes), key=lambda row: tuple(row.values())[:3])
    return write_rows(round.root / FOLDER / round.key, STEM, rows), len(rows)
