"""Provenance of a round: a tree of its inputs back to the base model and the prompts, each by content hash.

A hash is the one the later stage read (`deps` in dvc.lock, lineage.json), not the one the earlier stage wrote last. So
a round that was trained again is marked `differs` in the trees of its children.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from srpo.errors import UserError
from srpo.lineage.dvc_lock import read_dvc_lock, recorded
from srpo.lineage.record import adapter_weights, read_lineage
from srpo.rounds import BASE, RoundFiles
from srpo.storage.hashing import digest, dvc_digest

if TYPE_CHECKING:
    from rich.tree import Tree

FILE = "provenance.json"
MARKS = {
    "ok": "[green]ok[/]",
    "missing": "[yellow]missing[/]",
    "differs": "[bold red]differs[/]",
    "unchecked": "[dim]-[/]",
}
SHORT = 12


class Node(BaseModel):
    """One input, with its own inputs as children.

    Attributes:
        path: relative to the project.
        dvc: DVC's hash of the file or folder at `path`.
        sha256: of the file or folder at `path`, or of the file `sha256_of` in it.
        state: whether the file or folder at `path` has these hashes now.
    """

    name: str
    path: str | None = None
    dvc: str | None = None
    sha256: str | None = None
    sha256_of: str | None = None
    detail: str = ""
    state: Literal["ok", "missing", "differs", "unchecked"] = "unchecked"
    children: list[Node] = []

    def walk(self) -> list[Node]:
        """Return this node and all below, from the top."""
        return [self, *(node for child in self.children for node in child.walk())]


def round_provenance(root: Path, key: str) -> Node:
    """Return the provenance of a round, from its adapter back to base, by dvc.lock and the lineage.json files.

    Raises:
        UserError: the round has no adapter in this project folder.
    """
    if not (RoundFiles(root, key).adapter / "lineage.json").exists():
        raise UserError(f"rounds/{key}/adapter: no lineage.json; `dvc repro train@{key}` or `dvc pull train@{key}`")
    lock = read_dvc_lock(root)
    adapter = recorded(lock, f"train@{key}", "outs").get(f"rounds/{key}/adapter")
    return _round(root, lock, key, adapter, read_lineage(RoundFiles(root, key))["adapter"])


def verify(root: Path, node: Node) -> None:
    """Set the state of a node and of all below. Every file is read and hashed."""
    from tqdm import tqdm

    nodes = [(below, root / below.path) for below in node.walk() if below.path]
    for below, path in tqdm(nodes, desc="verify", unit="file", disable=None, leave=False):
        below.state = _state(path, below)


def render(node: Node, tree: Tree | None = None) -> Tree:
    """Return the node as a tree for the terminal."""
    from rich.markup import escape
    from rich.tree import Tree

    hashes = [f"{label} {value[:SHORT]}" for label, value in (("sha256", node.sha256), ("dvc", node.dvc)) if value]
    words = map(escape, filter(None, (node.path, node.detail, *hashes)))
    line = "  ".join([f"[bold]{escape(node.name)}[/]", *([MARKS[node.state]] if node.path else []), *words])
    branch = Tree(line) if tree is None else tree.add(line)
    for child in node.children:
        render(child, branch)
    return branch


def _round(root: Path, lock: Mapping[str, Any], key: str, adapter: str | None, sha256: str | None) -> Node:
    files = RoundFiles(root, key)
    folder = f"rounds/{key}"
    trained, selected, scored, generated = (
        recorded(lock, f"{stage}@{key}", "deps") for stage in ("train", "select", "score", "generate")
    )
    lineage = read_lineage(RoundFiles(root, key)) if (files.adapter / "lineage.json").exists() else {}
    weights = adapter_weights(files.adapter)
    inputs = [
        Node(
            name="adapter",
            path=f"{folder}/adapter",
            dvc=adapter,
            sha256=sha256,
            sha256_of=weights.name if weights else None,
        ),
        Node(
            name="winners",
            path=f"{folder}/winners",
            dvc=trained.get(f"{folder}/winners"),
            sha256=lineage.get("winners"),
        ),
        Node(name="scores", path=f"{folder}/scores/select", dvc=selected.get(f"{folder}/scores/select")),
        Node(name="candidates", path=f"{folder}/candidates", dvc=scored.get(f"{folder}/candidates")),
    ]
    if rewards := scored.get("rounds/base/rewards.json"):
        inputs.append(Node(name="rewards", path="rounds/base/rewards.json", dvc=rewards))
    prompts = {path: value for path, value in generated.items() if not path.startswith("rounds/")}
    inputs += [Node(name="prompts", path=path, dvc=value) for path, value in prompts.items()]
    parent = lineage.get("parent")
    if parent == BASE:
        inputs.append(_base(lineage["base"]))
    elif parent:
        above = f"rounds/{parent}/adapter"
        inputs.append(_round(root, lock, parent, trained.get(above), lineage["parent_adapter"]))
    return Node(name=f"round {key}", children=inputs)


def _base(base: Mapping[str, Any]) -> Node:
    local = base["digest"] is not None
    return Node(
        name="base model",
        path=base["source"] if local else None,
        detail="" if local else f"{base['source']} at {base['revision'] or 'no pinned revision'}",
        sha256=base["digest"],
        children=[
            Node(name="LoRA", path=lora["source"], detail=f"merged at {lora['scale']:g}", sha256=lora["digest"])
            for lora in base.get("loras", ())
        ],
    )


def _state(path: Path, node: Node) -> Literal["ok", "missing", "differs", "unchecked"]:
    if not path.exists():
        return "missing"
    checks = []
    if node.dvc:
        checks.append(dvc_digest(path) == node.dvc)
    if node.sha256:
        whole = path / node.sha256_of if node.sha256_of else path
        checks.append(whole.exists() and digest(whole) == node.sha256)
    if not checks:
        return "unchecked"
    return "ok" if all(checks) else "differs"
