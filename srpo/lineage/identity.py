"""Identity of a model: the content digest of a local one, the pinned revision of one on the Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo.errors import UserError
from srpo.storage.hashing import digest, value_digest

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def base_identity(base: Mapping[str, Any]) -> str | None:
    """Return what names a base model's weights: its digest or revision, and how they are changed; None if not pinned.

    Args:
        base: the entry `base` of lineage.json.
    """
    own = base.get("digest") or base.get("revision")
    changes = [base[name] for name in ("loras", "fp8") if base.get(name)]
    return value_digest([own, *changes]) if own and changes else own


def model_identity(root: Path, key: str, source: str, revision: str | None) -> dict[str, str | None]:
    """Return `source`, `revision` (Hub models only) and `digest` (local models only) of a model.

    Args:
        key: the key of params.yaml that names the model, for messages.
        source: a file or folder relative to `root`, or a Hub id.

    Raises:
        UserError: `source` is neither.
    """
    local = root / source
    if local.exists():
        return {"source": source, "revision": None, "digest": digest(local)}
    if not HUB_ID.fullmatch(source) or source.startswith("data/"):
        raise UserError(
            f"{key}: {source!r} is neither a file or folder here nor a Hub id; `dvc pull data.dvc` fetches data/"
        )
    if revision is None or not COMMIT.fullmatch(revision):
        log.warning("%s: %s is not pinned to a commit, so the model may change; set the revision", key, source)
    return {"source": source, "revision": revision, "digest": None}
