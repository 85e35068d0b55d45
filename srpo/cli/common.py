"""The Typer applications, and what all commands share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from srpo.config.loader import PARAMS_FILE, Params, load_params
from srpo.errors import BlockedError
from srpo.rounds import BASE, Round
from srpo.runtime.round_lock import lock_round

app = typer.Typer(
    name="srpo",
    help="Fine-tune SDXL toward human preference by rejection sampling, in rounds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lock_app = typer.Typer(help="Work with dvc.lock, the record of all stages.", no_args_is_help=True)
app.add_typer(lock_app, name="lock", rich_help_panel="Project")
prompts_app = typer.Typer(no_args_is_help=True, help="Bring prompts into the project.")
app.add_typer(prompts_app, name="prompts", rich_help_panel="Project")
candidates_app = typer.Typer(no_args_is_help=True, help="Bring candidates from elsewhere into a round.")
app.add_typer(candidates_app, name="candidates", rich_help_panel="Project")
RoundKey = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml")]
RoundOrBase = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml, or base")]


def project() -> tuple[Params, Path]:
    """Return the params of the project in this folder, and the folder."""
    return load_params(PARAMS_FILE), Path.cwd()


@contextmanager
def open_round(key: str, stage: str | None = None) -> Iterator[Round]:
    """Resolve a round of the project in this folder; for a stage, hold the round's lock and check its folder."""
    params, root = project()
    if key == BASE and stage not in ("base", "evaluate"):
        params.for_round(key)  # raises: base has no such stage
    round = Round.of(params, root, key)
    with lock_round(round.files, stage) if stage else nullcontext():
        if stage:
            _check_writable(round.files.folder)
        yield round


def _check_writable(folder: Path) -> None:
    """Fail now and not when the finished outputs are moved there."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise BlockedError(f"{existing}: not writable; change its permissions and run the same command again")
