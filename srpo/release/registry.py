"""MLflow's model registry: which rounds were promoted, and which of them is in use.

A campaign has one registered model. Every promoted adapter is a version of it, known by the sha256 of its weights:
promoting the same weights again makes no second version. The alias `champion` names the one in use, `previous` the
one before it. A LoRA is uploaded, so that `mlflow.diffusers.load_model` works; DVC stays what versions are
restored from (srpo/release/restore.py), and a version's tags say by which hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.config.loader import Params
from srpo.data.records import read_gate
from srpo.errors import UserError
from srpo.lineage import graph
from srpo.lineage.dvc_lock import read_dvc_lock
from srpo.lineage.record import adapter_weights, read_lineage
from srpo.release.mlflow_model import save_model
from srpo.release.model_card import licence_of
from srpo.rounds import Round
from srpo.storage.hashing import dvc_digest, file_digest
from srpo.tracking import records as projection
from srpo.tracking import sync

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
UPLOAD_SECONDS = "120"  # a server that passes a LoRA on to its store answers only when it is there


@dataclass(frozen=True)
class Decision:
    """Why a round is promoted.

    `override` is the reason to promote it although the gate failed it; unused where the gate passed it.
    """

    by: str
    reason: str
    override: str | None = None

    def tags(self, verdict: str) -> dict[str, str]:
        found = {"srpo.promoted_by": self.by, "srpo.promotion_reason": self.reason}
        return found | ({"srpo.override": self.override or ""} if verdict != "pass" else {})


def model_name(params: Params) -> str:
    """The campaign's registered model, `<experiment>-<campaign>`; MLflow takes no : and no / in it."""
    return re.sub(r"[/:%.\"']", "-", f"{params.tracking.experiment}-{params.tracking.campaign}")


def check(round: Round, override: str | None = None) -> str:
    """The sha256 of the round's adapter, when it may be promoted.

    Raises:
        UserError: no such round; its adapter is missing or is not what lineage.json and dvc.lock say; it was not
            evaluated as it is; or the gate failed it and `override` gives no reason.
    """
    files, stage = round.files, f"train@{round.key}"
    weights = adapter_weights(files.adapter)
    if weights is None or not (files.adapter / "lineage.json").exists():
        raise UserError(
            f"rounds/{round.key}/adapter: no adapter; `dvc repro {stage}` trains it, `dvc pull {stage}` brings it"
        )
    adapter = read_lineage(round.files)["adapter"]
    if file_digest(weights) != adapter:
        raise UserError(f"rounds/{round.key}/adapter: not the weights of its lineage.json; `dvc checkout {stage}`")
    lock, path = read_dvc_lock(round.root), f"rounds/{round.key}/adapter"
    recorded = graph.recorded(lock, stage, "outs").get(path)
    if recorded != dvc_digest(files.adapter):
        raise UserError(f"{path}: not what dvc.lock says, so it could not be restored; `dvc repro {stage}`")
    examined = graph.recorded(lock, f"evaluate@{round.key}", "deps").get(path)
    if not (files.evaluation / "gate.json").exists() or examined != recorded:
        raise UserError(f"rounds/{round.key}/evaluation: no verdict on this adapter; `dvc repro evaluate@{round.key}`")
    gate = read_gate(round.files)
    if gate["verdict"] != "pass" and not (override or "").strip():
        failed = ", ".join(name for name, rule in gate["rules"].items() if not rule["passed"])
        raise UserError(
            f"round {round.key}: the gate failed it ({failed}); give `override` a reason to promote it anyway"
        )
    return adapter


def promote(round: Round, decision: Decision, adapter: str | None = None) -> ModelVersion:
    """Register the round's adapter, unless it is registered, and make it the champion.

    Args:
        adapter: the sha256 that was decided on; None takes what is there.

    Raises:
        UserError: see `check`; the adapter is another by now; or MLflow can't be reached.
    """
    found = check(round, decision.override)
    if adapter not in (None, found):
        raise UserError(f"rounds/{round.key}/adapter: changed since it was decided on; promote it again")
    sync.project(round)
    with _records(round.params, round.root) as records:
        client, name = records.client, model_name(round.params)
        version = _find(_versions(client, name), found)
        approval = decision.tags(read_gate(round.files)["verdict"])
        if version is None:
            version = _register(records, name, round.key, approval)
        else:
            for tag, value in approval.items():
                client.set_model_version_tag(name, version.version, tag, value)
        champion = client.get_registered_model(name).aliases.get(CHAMPION)
        if champion is not None and str(champion) != number(version):
            client.set_registered_model_alias(name, PREVIOUS, champion)
        client.set_registered_model_alias(name, CHAMPION, version.version)
        return client.get_model_version(name, version.version)


def number(version: ModelVersion) -> str:
    """The version's number as text; MLflow has an int where it reads a database, text where it asks a server."""
    return str(version.version)


def versions(params: Params, root: Path) -> list[ModelVersion]:
    """All versions of the campaign's model, oldest first.

    Raises:
        UserError: MLflow can't be reached.
    """
    with _records(params, root) as records:
        return _versions(records.client, model_name(params))


def look_up(params: Params, root: Path, which: str) -> ModelVersion:
    """The version of this number (`3` or `v3`) or alias (`champion`).

    Raises:
        UserError: there is none, or MLflow can't be reached.
    """
    known = versions(params, root)
    for version in known:
        if which.removeprefix("v") == number(version) or which in version.aliases:
            return version
    names = ", ".join(number(version) for version in known) or "none; promote a round first"
    raise UserError(f"{model_name(params)}: no version or alias {which!r}; it has {names}")


def chain_of(params: Params, root: Path, which: str) -> graph.Node:
    """The chain of a round, under the versions that its adapter has; or of a version, as recorded when it was made.

    A name in params.yaml is a round, anything else a version.

    Raises:
        UserError: it is neither; the round has no adapter here; or MLflow can't be reached for a version.
    """
    if which not in params.rounds:
        version = look_up(params, root, which)
        return _under([version], recorded_chain(params, root, version))
    found = graph.round_chain(root, which)
    try:
        same = [v for v in versions(params, root) if v.tags.get("srpo.adapter") == found.children[0].sha256]
    except UserError as error:
        return graph.Node(name="versions", detail=f"unknown: {error}", children=[found])
    return _under(same, found)


def _under(found: list[ModelVersion], below: graph.Node) -> graph.Node:
    if not found:
        return graph.Node(name="no registered version", children=[below])
    names = ", ".join(" ".join([f"{v.name} {number(v)}", *(f"@{alias}" for alias in v.aliases)]) for v in found)
    return graph.Node(name=names, detail=f"Git {found[-1].tags['srpo.git_revision'][:12]}", children=[below])


def recorded_chain(params: Params, root: Path, version: ModelVersion) -> graph.Node:
    """The chain that was recorded when the version was registered.

    Raises:
        UserError: MLflow can't be reached, or does not have it.
    """
    from mlflow.artifacts import download_artifacts

    with _records(params, root) as records, tempfile.TemporaryDirectory() as folder:
        place = f"models:/{version.name}/{version.version}/{graph.FILE}"
        path = download_artifacts(place, dst_path=folder, tracking_uri=records.uri)
        return graph.Node.model_validate_json(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _records(params: Params, root: Path) -> Iterator[sync.Records]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", UPLOAD_SECONDS)
    try:
        with sync.opened(params, root) as records, _as_default(records.uri):
            yield records
    except UserError:
        raise
    except Exception as error:  # whatever a tracking server can do wrong
        raise UserError(f"tracking.uri: MLflow's registry did not do it ({sync.reason(error)})") from error


@contextlib.contextmanager
def _as_default(uri: str) -> Iterator[None]:
    """MLflow's address for what asks no client: a registry in a database looks logged models up at that one."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _versions(client: Any, name: str) -> list[ModelVersion]:
    # the search leaves aliases out
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted((client.get_model_version(name, v.version) for v in found), key=lambda v: int(v.version))


def _find(known: list[ModelVersion], adapter: str) -> ModelVersion | None:
    return next((version for version in known if version.tags.get("srpo.adapter") == adapter), None)


def _register(records: sync.Records, name: str, key: str, approval: dict[str, str]) -> ModelVersion:
    client, params, root = records.client, records.params, records.root
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description=f"Adapters of the campaign {params.tracking.campaign}.")
    record = projection.round_record(Round.of(params, root, key))
    runs = records.children(key)
    run_id = runs[0].info.run_id if runs else None
    model = client.create_logged_model(
        records.experiment, f"round-{key}", source_run_id=run_id, params=record.params, model_type="LoRA adapter"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", Round.of(params, root, key), model.model_id, run_id)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(model.model_id, "READY")
    tags = version_tags(Round.of(params, root, key), _versions(client, name)) | approval
    source = f"models:/{model.model_id}"
    note = f"Round {key} of the campaign {params.tracking.campaign}. The gate says: {tags['srpo.verdict']}."
    return client.create_model_version(name, source, run_id, tags, description=note, model_id=model.model_id)


def version_tags(round: Round, known: list[ModelVersion]) -> dict[str, str]:
    """What a version says of its origin: hashes by DVC (`dvc.<output>`) and by sha256, Git revision, params, licence.

    Args:
        known: the versions there are; the one of the parent's adapter becomes `srpo.parent_version`.
    """
    lineage = read_lineage(round.files)
    parent = _find(known, lineage["parent_adapter"]) if lineage["parent_adapter"] else None
    tags = projection.round_record(round).tags | {
        "srpo.round": round.key,
        "srpo.parent": lineage["parent"],
        "srpo.parent_version": number(parent) if parent else "none",
        "srpo.params": json.dumps(lineage["params"], sort_keys=True),
        "srpo.license": licence_of(lineage["base"]["source"]).id,
    }
    return {"srpo.git_revision": "none"} | tags
