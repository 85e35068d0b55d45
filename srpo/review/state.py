"""The state of a review: candidates and pairs in their order, the progress of raters, and checked decisions."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from statistics import median
from typing import Any
from urllib.parse import urlencode

from srpo.errors import UserError
from srpo.review.candidates import Images, load_candidates, picks_dataset, to_pick
from srpo.review.journal import Decision, Journal, check_rater
from srpo.review.pairs import Pair, load_pairs, on_the_left, samples_file, votes_dataset
from srpo.rounds import Round

RECENT = 50  # decisions that the time left is estimated from
DECISION_ID = re.compile(r"[\w-]{8,64}")
CHOICES = ("left", "right", "equal")
PAGES = {"picks": "/pick", "votes": "/compare"}


class BadRequest(Exception):
    """A request that no page of this server sends."""


class Review:
    """One round under review: its candidates and pairs, and the journals of what people decide."""

    def __init__(self, round: Round, against: str) -> None:
        self.round, self.against = round, against
        self.rewards = list(round.params.rewards) if round.files.scores.exists() else []
        self.candidates = load_candidates(round)
        self.images = Images(round.files.candidates)
        self.prompts = to_pick(self.candidates)
        self.pairs: list[Pair] = []
        self.samples: list[Images] = []
        self.no_pairs = ""
        try:
            self.pairs = load_pairs(round, against)
            self.samples = [Images(samples_file(round, key)) for key in (round.key, against)]
        except UserError as error:  # not evaluated yet: picking needs no evaluation
            self.no_pairs = str(error)
        self.journals = {kind: Journal(round.root, round.key, kind) for kind in ("picks", "votes")}
        self.items = {"picks": list(self.prompts), "votes": [pair.item for pair in self.pairs]}
        # decisions about the images of an earlier `generate` or `evaluate` stay on the disk and don't count
        self.dataset = {"picks": picks_dataset(round), "votes": self.pairs and votes_dataset(round, against)}
        for journal in self.journals.values():
            journal.decisions()  # a damaged file is reported now

    def progress(self, kind: str, rater: str) -> dict[str, Any]:
        """Return what a rater has done: decisions by item, counts, seconds left, and the first item not decided."""
        items = self.items[kind]
        decided = {row["item"]: row for row in self._current(kind, rater)}
        seconds = [row["seconds"] for row in list(decided.values())[-RECENT:]]
        left = len(items) - len(decided)
        first = next((item for item in items if item not in decided), None)
        minutes = math.ceil(left * median(seconds) / 60) if seconds and left else None
        return {"decided": decided, "done": len(decided), "all": len(items), "minutes": minutes, "first": first}

    def next_after(self, kind: str, rater: str, item: str) -> str | None:
        """Return the first undecided item after this one, else the first of all, else None."""
        items, decided = self.items[kind], self.progress(kind, rater)["decided"]
        at = items.index(item) + 1
        return next((other for other in [*items[at:], *items[:at]] if other not in decided), None)

    def save_pick(self, data: object) -> str:
        """Save what a rater picked and return the address of the next page.

        Raises:
            BadRequest: it is no decision about this round.
            OSError: it could not be written.
        """
        rater, item = check_rater(field(data, "rater", str)), field(data, "item", str)
        if item not in self.prompts:
            raise BadRequest("no such prompt")
        group, picked = self.prompts[item], field(data, "picked", str | None)
        if picked is not None and picked not in group["candidate_id"]:
            raise BadRequest("no such candidate of this prompt")
        shown = [
            {"candidate_id": row["candidate_id"], "image": _digest(self.images.bytes_at(row["place"]))}
            for row in group.to_dicts()
        ]
        scores_shown = field(data, "scores_shown", bool)
        decision = self._common("picks", data) | {"prompt": group["prompt"][0], "picked": picked, "shown": shown}
        self.journals["picks"].append(rater, decision | {"scores_shown": scores_shown})
        upcoming = self.next_after("picks", rater, item)
        return link("/pick", rater=rater, item=upcoming, scores="1" if scores_shown else None)

    def save_vote(self, data: object) -> str:
        """Save a rater's vote about a pair, as `save_pick` does."""
        rater, item, choice = (
            check_rater(field(data, "rater", str)),
            field(data, "item", str),
            field(data, "choice", str),
        )
        if item not in self.items["votes"] or choice not in CHOICES:
            raise BadRequest("no such pair or choice")
        pair = self.pairs[self.items["votes"].index(item)]
        left = on_the_left(pair, self.round.key, rater)
        names = (self.round.key, self.against)
        sides = {"left": names[left], "right": names[1 - left]}
        images = [_digest(one.bytes_at(place)) for one, place in zip(self.samples, pair.places, strict=True)]
        shown = {side: {"model": name, "image": images[names.index(name)]} for side, name in sides.items()}
        decision = self._common("votes", data) | {
            "prompt_id": pair.prompt_id,
            "prompt": pair.prompt,
            "index": pair.index,
        }
        decision |= {"against": self.against, "choice": choice, "winner": sides.get(choice), "shown": shown}
        self.journals["votes"].append(rater, decision)
        return link("/compare", rater=rater, item=self.next_after("votes", rater, item))

    def undo_last(self, kind: str, data: object) -> str | None:
        """Undo a rater's last decision and return the address of its page, or None where there is none."""
        rater, identity = check_rater(field(data, "rater", str)), _decision_id(data)
        standing = self._current(kind, rater)
        if not standing:
            return None
        self.journals[kind].append(rater, {"id": identity, "undo": standing[-1]["id"]})
        return link(PAGES[kind], rater=rater, item=standing[-1]["item"])

    def _current(self, kind: str, rater: str) -> list[Decision]:
        return [row for row in self.journals[kind].decisions(rater) if row["dataset"] == self.dataset[kind]]

    def _common(self, kind: str, data: object) -> Decision:
        seconds = float(field(data, "seconds", int | float))
        if not 0 <= seconds < 1e6:
            raise BadRequest("seconds is out of range")
        decision = {"id": _decision_id(data), "item": field(data, "item", str), "seconds": round(seconds, 2)}
        return decision | {"dataset": self.dataset[kind]}


def link(path: str, **query: str | int | None) -> str:
    """Return an address of this server; parameters without a value are left out."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def field(data: object, name: str, kind: Any) -> Any:
    """Return a field of what a page sent.

    Raises:
        BadRequest: it is missing, or of another type.
    """
    if not isinstance(data, Mapping) or name not in data or not isinstance(data[name], kind):
        raise BadRequest(f"{name} is missing or of another type")
    return data[name]


def _decision_id(data: object) -> str:
    identity = field(data, "id", str)
    if not DECISION_ID.fullmatch(identity):
        raise BadRequest("id is not usable")
    return identity


def _digest(data: bytes | None) -> str:
    return hashlib.sha256(data or b"").hexdigest()
