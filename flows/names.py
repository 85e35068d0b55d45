"""Names by which several projects on one Prefect server tell their runs and artifacts apart."""

from __future__ import annotations

from pathlib import Path

from srpo.storage.project import project_identity


def project_name() -> str:
    """Return the project's identity in lowercase letters, digits and dashes, as Prefect's artifacts require."""
    return project_identity(Path.cwd()).lower().replace("_", "-")


def run_name() -> str:
    """Return the name of a run of `srpo-rounds`."""
    return f"srpo-rounds-{project_name()}"


def artifact_key(name: str) -> str:
    """Return the key of an artifact: versions of one key are one artifact to Prefect."""
    return f"srpo-{project_name()}-{name.lower().replace('_', '-')}"
