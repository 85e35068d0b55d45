"""MLflow's model registry: the promoted rounds, and the one in use.

A campaign has one registered model. Each promoted adapter is a version of it, identified by the sha256 of its weights,
so promoting the same weights again adds no version. The alias `champion` names the version in use, `previous` the one
before it. A LoRA is uploaded for `mlflow.diffusers.load_model`; versions are restored from DVC (restore.py), by the
hash in their tags.
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
from srpo.lineage.dvc_lock import read_dvc_lock, recorded
from srpo.lineage.record import adapter_weights, read_lineage
from srpo.release.mlflow_model import save_model
from srpo.release.model_card import license_of
from srpo.rounds import Round
from srpo.storage.hashing import dvc_digest, file_digest
from srpo.tracking.campaign import CAMPAIGN, PROJECT, Campaign, opened
from srpo.tracking.connection import reason
from srpo.tracking.records import round_params, round_record
from srpo.tracking.sync import sync_round

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
UPLOAD_SECONDS = "120"  # a server answers an upload only after passing it on to its artifact store


@dataclass(frozen=True)
class Decision:
    """The decision to promote a round.

    Attributes:
        by: `auto`, or the person who decided.
        reason: free text.
        override: the reason to promote a round that failed its gate; unused if it passed.
    """

    by: str
    reason: str
    override: str | None = None

    def tags(self, verdict: str) -> dict[str, str]:
        """Return the decision as tags of a version, given the gate's verdict."""
        tags = {"srpo.promoted_by": self.by, "srpo.promotion_reason": self.reason}
        return tags | ({"srpo.override": self.override or ""} if verdict != "pass" else {})


def model_name(params: Params, campaign: Campaign) -> str:
    """Return the name of the campaign's registered model.

    It is `<experiment>-<campaign>`, without characters that MLflow refuses, and with the project's identity added if
    the model of this name is another project's.
    """
    name = re.sub(r"[/:%.\"']", "-", f"{params.tracking.experiment}-{campaign.name}")
    models = campaign.client.search_registered_models(f"name = '{name}'")
    return f"{name}-{campaign.project}" if models and models[0].tags.get(PROJECT) != campaign.project else name


def check(round: Round, override: str | None = None) -> str:
    """Return the sha256 of the round's adapter if the round may be promoted.

    Raises:
        UserError: its adapter is missing or differs from lineage.json or dvc.lock; this adapter was not evaluated;
            or it failed its gate, or lacks votes that promotion requires, and `override` gives no reason.
    """
    files, stage = round.files, f"train@{round.key}"
    weights = adapter_weights(files.adapter)
    if weights is None or not (files.adapter / "lineage.json").exists():
        raise UserError(
            f"rounds/{round.key}/adapter: no adapter; `dvc repro {stage}` trains it, `dvc pull {stage}` downloads it"
        )
    adapter = read_lineage(round.files)["adapter"]
    if file_digest(weights) != adapter:
        raise UserError(
            f"rounds/{round.key}/adapter: its weights differ from lineage.json; `dvc checkout {stage}` restores them"
        )
    lock, path = read_dvc_lock(round.root), f"rounds/{round.key}/adapter"
    trained = recorded(lock, stage, "outs").get(path)
    if trained != dvc_digest(files.adapter):
        raise UserError(f"{path}: differs from dvc.lock, so it could not be restored later; `dvc repro {stage}`")
    evaluated = recorded(lock, f"evaluate@{round.key}", "deps").get(path)
    if not (files.evaluation / "gate.json").exists() or evaluated != trained:
        raise UserError(f"rounds/{round.key}/evaluation: this adapter is not evaluated; `dvc repro gate@{round.key}`")
    gate = read_gate(round.files)
    if not (override or "").strip():
        _check_gate(round, gate)
    return adapter


def _check_gate(round: Round, gate: dict[str, Any]) -> None:
    anyway = "`override` takes a reason to promote it anyway"
    if gate["verdict"] != "pass":
        failed = ", ".join(name for name, rule in gate["rules"].items() if not rule["passed"])
        raise UserError(f"round {round.key}: failed its gate ({failed}); {anyway}")
    limits, votes = round.params.gate, (gate["human"] or {}).get("votes", 0)
    if limits.require_human_votes and votes < limits.min_human_votes:
        raise UserError(
            f"round {round.key}: its gate counts {votes} votes of people, and gate.min_human_votes asks for"
            f" {limits.min_human_votes}; vote with `srpo review {round.key}`, then `srpo votes {round.key} --freeze`;"
            f" {anyway}"
        )


def promote(round: Round, decision: Decision, adapter: str | None = None) -> ModelVersion:
    """Register the round's adapter if it is not registered yet, and make it the champion.

    Args:
        adapter: the sha256 the decision was about; None for the adapter as it is now.

    Raises:
        UserError: see `check`; the adapter has changed since the decision; or MLflow can't be reached.
    """
    current = check(round, decision.override)
    if adapter not in (None, current):
        raise UserError(f"rounds/{round.key}/adapter: changed since the decision; promote it again")
    sync_round(round)
    with registry(round.params, round.root) as campaign:
        client, name = campaign.client, model_name(round.params, campaign)
        version = _find(_versions(client, name), current)
        approval = decision.tags(read_gate(round.files)["verdict"])
        if version is None:
            version = _register(campaign, name, round, approval)
        else:
            for tag, value in approval.items():
                client.set_model_version_tag(name, version.version, tag, value)
        champion = client.get_registered_model(name).aliases.get(CHAMPION)
        if champion is not None and str(champion) != number(version):
            client.set_registered_model_alias(name, PREVIOUS, champion)
        client.set_registered_model_alias(name, CHAMPION, version.version)
        return client.get_model_version(name, version.version)


def number(version: ModelVersion) -> str:
    """Return the version's number as text; MLflow returns an int from a database and text from a server."""
    return str(version.version)


def versions(params: Params, root: Path) -> list[ModelVersion]:
    """Return all versions of the campaign's model, oldest first.

    Raises:
        UserError: MLflow can't be reached.
    """
    return _known(params, root)[1]


def look_up(params: Params, root: Path, which: str) -> ModelVersion:
    """Return the version with this number (`3` or `v3`) or alias (`champion`).

    Raises:
        UserError: there is none, or MLflow can't be reached.
    """
    model, known = _known(params, root)
    for version in known:
        if which.removeprefix("v") == number(version) or which in version.aliases:
            return version
    names = ", ".join(number(version) for version in known) or "none; promote a round first"
    raise UserError(f"{model}: no version or alias {which!r}; there is {names}")


def _known(params: Params, root: Path) -> tuple[str, list[ModelVersion]]:
    with registry(params, root) as campaign:
        name = model_name(params, campaign)
        return name, _versions(campaign.client, name)


@contextlib.contextmanager
def registry(params: Params, root: Path) -> Iterator[Campaign]:
    """Connect to MLflow's registry.

    Raises:
        UserError: MLflow can't be reached, or a request in the block failed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", UPLOAD_SECONDS)
    try:
        with opened(params, root) as campaign:
            yield campaign
    except UserError:
        raise
    except Exception as error:  # a server may fail in any way
        raise UserError(f"tracking.uri: the request to MLflow's registry failed ({reason(error)})") from error


def _versions(client: Any, name: str) -> list[ModelVersion]:
    # a search leaves out aliases
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted((client.get_model_version(name, v.version) for v in found), key=lambda v: int(v.version))


def _find(known: list[ModelVersion], adapter: str) -> ModelVersion | None:
    return next((version for version in known if version.tags.get("srpo.adapter") == adapter), None)


def _register(campaign: Campaign, name: str, round: Round, approval: dict[str, str]) -> ModelVersion:
    client = campaign.client
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        owner = {PROJECT: campaign.project, CAMPAIGN: campaign.name}
        client.create_registered_model(name, owner, f"Adapters of the campaign {campaign.name}.")
    runs = campaign.runs_of(round.key)
    run_id = runs[0].info.run_id if runs else None
    model = client.create_logged_model(
        campaign.experiment,
        f"round-{round.key}",
        source_run_id=run_id,
        params=round_params(round),
        model_type="LoRA adapter",
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", round, model.model_id, run_id)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(model.model_id, "READY")
    tags = version_tags(round, _versions(client, name)) | approval
    source = f"models:/{model.model_id}"
    note = f"Round {round.key} of the campaign {campaign.name}. Gate: {tags['srpo.verdict']}."
    return client.create_model_version(name, source, run_id, tags, description=note, model_id=model.model_id)


def version_tags(round: Round, known: list[ModelVersion]) -> dict[str, str]:
    """Return a version's tags: hashes by DVC (`dvc.<output>`) and by sha256, Git revision, params, license.

    Args:
        known: all versions; the one with the parent's adapter becomes `srpo.parent_version`.
    """
    lineage = read_lineage(round.files)
    parent = _find(known, lineage["parent_adapter"]) if lineage["parent_adapter"] else None
    record = round_record(round)
    known_tags = record.tags if record else {}
    tags = {name: value for name, value in known_tags.items() if name.startswith(("srpo.", "dvc."))} | {
        "srpo.round": round.key,
        "srpo.parent": lineage["parent"],
        "srpo.parent_version": number(parent) if parent else "none",
        "srpo.params": json.dumps(lineage["params"], sort_keys=True),
        "srpo.license": license_of(lineage["base"]["source"]).id,
    }
    return {"srpo.git_revision": "none"} | tags
