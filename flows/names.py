"""Names by which several projects on one Prefect server tell their runs and artifacts apart."""

from __future__ import annotations

import re
from pathlib import Path


def project_name() -> str:
    """Return the name of this project's folder in lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", Path.cwd().name.lower()).strip("-") or "project"


def run_name() -> str:
    """Return the name of a run of `srpo-rounds`."""
    return f"srpo-rounds-{project_name()}"


def artifact_key(name: str) -> str:
    """Return the key of an artifact: versions of one key are one artifact to Prefect."""
    return f"srpo-{project_name()}-{name.lower().replace('_', '-')}"
