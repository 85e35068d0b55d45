"""Stage `base`: write down which base model and which reward models these rounds stand on."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.errors import MissingFile, UserError, one_line
from srpo.rounds import BASE, RoundFiles
from srpo.storage.hashing import digest

log = logging.getLogger("srpo")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def pin_base(params: Params, root: Path) -> None:
    """Write `rounds/base/adapter/lineage.json`, `rounds/base/rewards.json` and `rounds/base/preview.json`.

    Every other stage depends on one of them, so a changed model folder or revision reruns what it must. The last names
    only the reward that scores previews: with another judge the candidates stay.

    Raises:
        UserError: a model is neither a folder or file here nor shaped like a Hub id.
    """
    files = RoundFiles(root, BASE)
    scratch = root / ".srpo" / "scratch" / "base"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = params.model
    lineage = {"base": _identity(root, "model.base", model.base, model.revision)}
    if model.vae:
        lineage["vae"] = _identity(root, "model.vae", model.vae, model.vae_revision)
    write_json(scratch / "lineage.json", lineage)
    rewards = {
        name: _identity(root, f"rewards.{name}.model", spec.model, spec.revision)
        if spec.model
        else {"source": spec.kind, "revision": spec.revision, "digest": None}
        for name, spec in params.rewards.items()
    }
    rejection = params.generate.early_rejection
    preview = {rejection.reward: rewards[rejection.reward]} if rejection else {}
    for path, content in {files.rewards: rewards, files.preview: preview}.items():
        write_json(scratch / path.name, content)
        parquet.publish(scratch / path.name, path)
    parquet.publish(scratch, files.adapter)


def write_json(path: Path, value: object) -> None:
    """Write JSON that reads well in a diff, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file of this project's own.

    Raises:
        UserError: the file is damaged; a `MissingFile` where it is not there.
    """
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in reading this file of a round is one line that names it.

    Raises:
        UserError: the file is damaged; a `MissingFile` where it is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{path}: missing; run the stage that makes it, or `dvc checkout`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error):.120}); `dvc checkout` restores it") from None


def _identity(root: Path, key: str, source: str, revision: str | None) -> dict[str, str | None]:
    local = root / source
    if local.exists():
        return {"source": source, "revision": None, "digest": digest(local)}
    if not HUB_ID.fullmatch(source) or source.startswith("data/"):
        raise UserError(
            f"{key}: {source!r} is no folder here and no Hub id; `dvc pull data.dvc` brings the embedded ones"
        )
    if revision is None or not COMMIT.fullmatch(revision):
        log.warning("%s: %s is not pinned to a commit; what it names may change under you", key, source)
    return {"source": source, "revision": revision, "digest": None}
