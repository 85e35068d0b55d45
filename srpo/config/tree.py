"""The tree of rounds, rooted at `base`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Protocol

BASE = "base"
ROUND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class HasParent(Protocol):
    """A round as the tree needs it."""

    @property
    def parent(self) -> str:
        """The key of the parent."""


def check_tree(parents: Mapping[str, str]) -> None:
    """Check that {round: parent} is a tree rooted at `base`.

    Raises:
        ValueError: invalid round name, unknown parent or a cycle; the message names the round.
    """
    for key, parent in parents.items():
        if key == BASE or not ROUND_NAME.fullmatch(key):
            raise ValueError(f"{key!r} is not a valid name; use letters, digits, - and _, and not `base`")
        if parent != BASE and parent not in parents:
            raise ValueError(f"{key}.parent: no round {parent!r}; use base or a round of this file")
    for key in parents:
        path = [key]
        parent = parents[key]
        while parent != BASE:
            if parent in path:
                raise ValueError(f"{key}.parent: the parents form a cycle: {' -> '.join([*path, parent])}")
            path.append(parent)
            parent = parents[parent]


def ancestors(tree: Mapping[str, HasParent], key: str) -> list[str]:
    """Return the rounds between base and `key`, the oldest first."""
    path: list[str] = []
    parent = tree[key].parent
    while parent != BASE:
        path.append(parent)
        parent = tree[parent].parent
    return path[::-1]


def order(tree: Mapping[str, HasParent]) -> list[str]:
    """Return all rounds, parents before children, otherwise in file order."""
    depth = {key: len(ancestors(tree, key)) for key in tree}
    return sorted(tree, key=lambda key: depth[key])


def branches(tree: Mapping[str, HasParent], keys: Collection[str]) -> list[list[str]]:
    """Return the tree of `keys` (rounds and base) as paths, the main path first.

    A path follows each round's first child. Every other child starts a path that begins with the round it branches off.
    A round whose parent is not in `keys` is a child of its nearest ancestor in `keys`.
    """
    children: dict[str, list[str]] = {}
    for key in (key for key in tree if key in keys):
        above = [name for name in (BASE, *ancestors(tree, key)) if name in keys]
        children.setdefault(above[-1] if above else BASE, []).append(key)

    def grow(path: list[str]) -> list[list[str]]:
        start = len(path) - 1  # forks of earlier rounds belong to the calling path
        while child_keys := children.get(path[-1]):
            path.append(child_keys[0])
        forks = [[key, child] for key in path[start:] for child in children.get(key, [])[1:]]
        return [path, *(branch for fork in forks for branch in grow(fork))]

    return grow([BASE])
