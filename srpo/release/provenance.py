"""Provenance of a round or of a registered version, with the versions of its adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.lineage import graph
from srpo.release.registry import look_up, number, registry, versions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def provenance(params: Params, root: Path, which: str) -> graph.Node:
    """Return the provenance of a round, below the versions of its adapter; or of a version, as it was registered.

    Args:
        which: a round of params.yaml; any other name is the number or alias of a version.

    Raises:
        UserError: it is neither; the round has no adapter in this project folder; or MLflow can't be reached to look
            up a version.
    """
    if which not in params.rounds:
        version = look_up(params, root, which)
        return _below([version], registered_provenance(params, root, version))
    tree = graph.round_provenance(root, which)
    try:
        same = [v for v in versions(params, root) if v.tags.get("srpo.adapter") == tree.children[0].sha256]
    except UserError as error:
        return graph.Node(name="versions", detail=f"unknown: {error}", children=[tree])
    return _below(same, tree)


def _below(known: list[ModelVersion], tree: graph.Node) -> graph.Node:
    if not known:
        return graph.Node(name="no registered version", children=[tree])
    names = ", ".join(" ".join([f"{v.name} {number(v)}", *(f"@{alias}" for alias in v.aliases)]) for v in known)
    return graph.Node(name=names, detail=f"Git {known[-1].tags['srpo.git_revision'][:12]}", children=[tree])


def registered_provenance(params: Params, root: Path, version: ModelVersion) -> graph.Node:
    """Return the provenance that was uploaded when the version was registered.

    Raises:
        UserError: MLflow can't be reached or does not have it.
    """
    from mlflow.artifacts import download_artifacts

    with registry(params, root), tempfile.TemporaryDirectory() as folder:
        place = f"models:/{version.name}/{version.version}/{graph.FILE}"
        path = download_artifacts(place, dst_path=folder)
        return graph.Node.model_validate_json(Path(path).read_text(encoding="utf-8"))
