"""All checks of `srpo check`, in the order in which to fix them."""

from __future__ import annotations

from pathlib import Path

from srpo.config.loader import Params
from srpo.preflight import CheckResult
from srpo.preflight.capacity import check_capacity
from srpo.preflight.data import check_prompts, check_reference
from srpo.preflight.models import check_models
from srpo.preflight.services import check_mlflow, check_repositories


def check_project(params: Params, root: Path) -> list[CheckResult]:
    """Run all checks. Writes nothing but one object to the DVC remote, and deletes it."""
    results, prompts = check_prompts(params, root)
    return [
        CheckResult("params.yaml", "ok", f"valid; {len(params.rounds)} rounds"),
        *check_models(params, root),
        *results,
        check_reference(params, root),
        *check_repositories(root),
        check_mlflow(params.tracking.uri),
        *check_capacity(params, root, prompts),
    ]
