"""Identity of a project in the services that it shares with others."""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path

from srpo.errors import UserError

log = logging.getLogger(__name__)

IDENTITY_FILE = ".srpo-project"
IDENTITY = re.compile(r"[A-Za-z0-9_-]{1,40}")
DVC_COPIES = (".dvc", "tmp", "exps")


def project_folder(root: Path) -> Path:
    """Return the project folder of `root`: for a copy that `dvc exp run --temp` or `--queue` made, the original."""
    folder = root.resolve()
    return next((path.parents[2] for path in folder.parents if path.parts[-3:] == DVC_COPIES), folder)


def project_identity(root: Path) -> str:
    """Return the project's identity, such as `birds-3f9a1c0b`, from `.srpo-project`; make the file if there is none.

    The file belongs in Git: clones of one project then share their runs and models in MLflow.

    Raises:
        UserError: the file does not hold one identity.
    """
    path = project_folder(root) / IDENTITY_FILE
    if not path.exists():
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.parent.name).strip("-")[:24] or "project"
        path.write_text(f"{name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
        log.info("wrote %s, the project's identity in MLflow; commit it, so that all clones share it", IDENTITY_FILE)
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not IDENTITY.fullmatch(text):
        raise UserError(
            f"{IDENTITY_FILE}: not one line of letters, digits, - and _; keep one identity, or `git checkout` the file"
        )
    return text
