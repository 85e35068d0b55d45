"""Rounds: their tree, their files, and a round with all that its stages need to know."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from srpo.config.loader import Params

BASE = "base"
ROUND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class HasParent(Protocol):
    """What the tree needs to know of a round."""

    parent: str


@dataclass(frozen=True)
class RoundFiles:
    """The paths of one round's files under `<root>/rounds/<key>/`."""

    root: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.root / "rounds" / self.key

    @property
    def candidates(self) -> Path:
        return self.folder / "candidates"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.parquet"

    @property
    def winners(self) -> Path:
        return self.folder / "winners"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def training(self) -> Path:
        return self.folder / "training.csv"

    @property
    def rewards(self) -> Path:
        """Of base only: the identities of all rewards."""
        return self.folder / "rewards.json"

    @property
    def preview(self) -> Path:
        """Of base only: the identity of the reward that scores previews."""
        return self.folder / "preview.json"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def report(self) -> Path:
        return self.folder / "report"


@dataclass(frozen=True)
class Round:
    """One round, or base: its settings with its overrides applied, and where its files are.

    Made once, where a command enters; stages pass it on.

    Attributes:
        key: a key of `rounds` in params.yaml, or `base`.
        params: resolved for this round; base's are those of the file.
        root: the project's folder, which holds params.yaml.
    """

    key: str
    params: Params
    root: Path

    @classmethod
    def of(cls, params: Params, root: Path, key: str) -> Round:
        """Return the round `key` of these params.

        Raises:
            UserError: there is no such round.
        """
        return cls(key, params if key == BASE else params.for_round(key), root)

    @property
    def parent(self) -> str:
        """The parent's key; base's parent is base."""
        return BASE if self.key == BASE else self.params.rounds[self.key].parent

    @property
    def ancestors(self) -> list[str]:
        """The rounds from the first after base down to the parent."""
        return [] if self.key == BASE else ancestors(self.params.rounds, self.key)

    @property
    def files(self) -> RoundFiles:
        return RoundFiles(self.root, self.key)

    @property
    def parent_files(self) -> RoundFiles:
        return RoundFiles(self.root, self.parent)

    @property
    def base_files(self) -> RoundFiles:
        return RoundFiles(self.root, BASE)


def check_tree(parents: Mapping[str, str]) -> None:
    """Check that {round: parent} is a tree rooted at `base`.

    Raises:
        ValueError: bad round name, unknown parent or a cycle; the text names the round.
    """
    for key, parent in parents.items():
        if key == BASE or not ROUND_NAME.fullmatch(key):
            raise ValueError(f"{key!r} can't name a round; use letters, digits, - and _, and not `base`")
        if parent != BASE and parent not in parents:
            raise ValueError(f"{key}.parent: there is no round {parent!r}; name base or a round of this file")
    for key in parents:
        seen, at = [key], parents[key]
        while at != BASE:
            if at in seen:
                raise ValueError(f"{key}.parent: the parents run in a circle: {' -> '.join([*seen, at])}")
            seen.append(at)
            at = parents[at]


def ancestors(tree: Mapping[str, HasParent], key: str) -> list[str]:
    """The rounds from the first after base down to the parent of `key`, `key` itself left out."""
    path, at = [], tree[key].parent
    while at != BASE:
        path.append(at)
        at = tree[at].parent
    return path[::-1]


def order(tree: Mapping[str, HasParent]) -> list[str]:
    """All rounds, parents before children, file order among equals."""
    depth = {key: len(ancestors(tree, key)) for key in tree}
    return sorted(tree, key=lambda key: depth[key])


def branches(tree: Mapping[str, HasParent], keys: Collection[str]) -> list[list[str]]:
    """Those of `keys` (rounds and base) as paths that together are the tree, the trunk first.

    A path follows each round's first child; every other child starts a path of its own, which begins with the
    round it branches off. A round whose parent is not among the keys hangs on its nearest ancestor that is.
    """
    children: dict[str, list[str]] = {}
    for key in (key for key in tree if key in keys):
        above = [name for name in (BASE, *ancestors(tree, key)) if name in keys]
        children.setdefault(above[-1] if above else BASE, []).append(key)

    def grow(path: list[str]) -> list[list[str]]:
        start = len(path) - 1  # the forks of what is before are the calling path's
        while below := children.get(path[-1]):
            path.append(below[0])
        forks = [[key, child] for key in path[start:] for child in children.get(key, [])[1:]]
        return [path, *(found for fork in forks for found in grow(fork))]

    return grow([BASE])
