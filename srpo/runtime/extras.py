"""Packages that only some commands need, and the extra that installs each."""

from __future__ import annotations

from importlib.util import find_spec

from srpo.errors import UserError

EXTRAS = {
    "bitsandbytes": ("bitsandbytes", "optimizers"),
    "dvc": ("DVC", "dvc"),
    "mlflow": ("MLflow", "tracking"),
    "prefect": ("Prefect", "flows"),
    "prodigyopt": ("prodigyopt", "optimizers"),
    "ray": ("Ray", "cluster"),
}


def missing(package: str) -> str | None:
    """Return what to install for `package`, a key of `EXTRAS`, as the end of a line; None if it is installed."""
    if find_spec(package):
        return None
    name, extra = EXTRAS[package]
    return f"needs {name}; pip install 'srpo[{extra}]'"


def require(package: str, what: str) -> None:
    """Check that `package` is installed before work starts that would fail without it.

    Args:
        package: a key of `EXTRAS`.
        what: the command that needs it, the line's first words.

    Raises:
        UserError: it is not installed; the line names the extra to install.
    """
    if line := missing(package):
        raise UserError(f"{what} {line}")
