"""Stage `base`: the identities of the base model and the reward models of a campaign."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from srpo.config.schema import BaseLora
from srpo.lineage.checkpoint_files import lora_file
from srpo.lineage.identity import model_identity
from srpo.rounds import Round
from srpo.storage.files import publish
from srpo.storage.hashing import digest
from srpo.storage.json_files import write_json

log = logging.getLogger(__name__)


def pin_base(round: Round) -> None:
    """Write `adapter/lineage.json`, `rewards.json`, `selecting.json` and `preview.json` in `rounds/base/`.

    Every other stage depends on one of these files, so a changed model folder or revision reruns the stages that use
    it. selecting.json has only the rewards that choose winners, preview.json only the one that scores previews: select
    and generate do not depend on the others.

    Raises:
        UserError: a model is neither a local folder or file nor formatted like a Hub id, or a LoRA is missing.
    """
    files = round.files
    params = round.params
    root = round.root
    scratch = root / ".srpo" / "scratch" / "base"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = params.model
    base: dict[str, Any] = {**model_identity(root, "model.base", model.base, model.revision)}
    if model.loras:
        base["loras"] = [_lora_identity(root, number, lora) for number, lora in enumerate(model.loras)]
    if model.fp8:
        base["fp8"] = True
    lineage = {"base": base}
    if model.vae:
        lineage["vae"] = model_identity(root, "model.vae", model.vae, model.vae_revision)
    write_json(scratch / "lineage.json", lineage)
    rewards = {
        name: model_identity(root, f"rewards.{name}.model", spec.model, spec.revision)
        if spec.model
        else {"source": spec.kind, "revision": spec.revision, "digest": None}
        for name, spec in params.rewards.items()
    }
    rejection = params.generate.early_rejection
    preview = {rejection.reward: rewards[rejection.reward]} if rejection else {}
    selecting = {
        name: rewards[name] | {"weight": params.rewards[name].weight} for name in params.reward_names("select")
    }
    for path, content in {files.rewards: rewards, files.selecting: selecting, files.preview: preview}.items():
        write_json(scratch / path.name, content)
        publish(scratch / path.name, path)
    publish(scratch, files.adapter)


def _lora_identity(root: Path, number: int, lora: BaseLora) -> dict[str, Any]:
    file = lora_file(f"model.loras.{number}", root, lora.path)
    return {"source": lora.path, "digest": digest(file), "scale": lora.scale}
