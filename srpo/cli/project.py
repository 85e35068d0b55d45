"""Commands around a project: create it, check it, bring data into it, clean it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srpo import __version__
from srpo.cli.common import RoundKey, app, candidates_app, lock_app, open_round, project, prompts_app
from srpo.errors import UserError

PANEL = "Project"


@app.command(rich_help_panel=PANEL)
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder of the project")] = Path(),
    preset: Annotated[str, typer.Option(help="sdxl, or tiny (in a clone of the repository only)")] = "sdxl",
) -> None:
    """Create a project: params.yaml from a preset, the pipeline, Git and DVC. Overwrites no file."""
    from srpo.scaffold.init import init_project, next_steps

    print(f"wrote {', '.join(init_project(folder, preset))} under {folder.resolve()}")
    print(f"next: {next_steps(preset)}")


@app.command(rich_help_panel=PANEL)
def check() -> None:
    """Check models, data, DVC and MLflow before hours are spent; estimate hours, memory and disk."""
    params, root = project()
    from srpo.preflight.checks import check_project

    results = check_project(params, root)
    width = max(len(result.name) for result in results)
    for result in results:
        print(f"{result.state:4}  {result.name:{width}}  {result.text}")
    if failed := sum(result.state == "fail" for result in results):
        raise UserError(f"{failed} of {len(results)} checks failed; fix the checks marked `fail` above")


@prompts_app.command("import")
def import_prompts(
    source: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="txt, csv, json, jsonl or parquet files, folders, Hub ids")
    ],
    column: Annotated[str, typer.Option(help="column or key of the prompt")] = "prompt",
    tag: Annotated[list[str], typer.Option(help="column or key whose values become tags; repeat for more")] = [],  # noqa: B006
    split: Annotated[str, typer.Option(help="split of a Hub data set")] = "train",
    eval: Annotated[int, typer.Option(help="prompts to hold out")] = 500,
    seed: Annotated[int, typer.Option(help="which prompts are held out")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace the prompt files")] = False,
) -> None:
    """Write prompts.train and prompts.eval from any prompts: cleaned, without near repeats, some held out."""
    params, root = project()
    from srpo.data.import_prompts import import_prompts
    from srpo.tools.prompt_tokens import token_counter

    summary = import_prompts(
        source,
        root / params.prompts.train,
        root / params.prompts.eval,
        column=column,
        tags=tag,
        split=split,
        eval_count=eval,
        seed=seed,
        overwrite=force,
        count_tokens=token_counter(params.model, root),
    )
    print("\n".join(summary.lines()))


@candidates_app.command("import")
def import_candidates(
    key: RoundKey,
    source: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="parquet files, or folders of these or of images")
    ],
    column: Annotated[str, typer.Option(help="column or key of the prompt")] = "prompt",
    to: Annotated[Path, typer.Option(help="folder to write to")] = Path("data"),
) -> None:
    """Write images with prompts, or pairs with labels, for a round to score, select and train on."""
    from srpo.tools.import_candidates import import_candidates

    with open_round(key) as round:
        found = import_candidates(round, source, column, round.root / to)
    left_out = "".join(f"; left out {count} {name}" for name, count in found.left_out.items())
    print(f"{found.images} images of {found.prompts} prompts, {found.pairs} pairs{left_out}")
    folder = found.candidates.relative_to(round.root).as_posix()
    print(f'in params.yaml, rounds."{key}":  generate: {{candidates: {folder}}}')
    if found.picks:
        print(f"    select: {{picks: {found.picks.relative_to(round.root).as_posix()}}}")
    print(f"track them with `dvc add {folder}`, or with the folder that is under DVC already")


@app.command(rich_help_panel=PANEL)
def prune(
    rounds: Annotated[
        list[str] | None, typer.Argument(metavar="[ROUND]...", help="decided rounds; default all of them")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete; without it, only count bytes")] = False,
) -> None:
    """Delete the candidates of decided rounds from workspace, DVC cache and remote; all other outputs stay."""
    params, root = project()
    from srpo.tools.prune import prune

    results = prune(params, root, rounds or None, delete)
    for result in results:
        places = {"workspace": result.workspace, "cache": result.cache, "remote": result.remote}
        print(f"{result.key}: " + ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in places.items()))
    total = sum(result.workspace + result.cache + result.remote for result in results)
    if delete:
        print(
            f"{total / 1e9:.3f} GB deleted; from now on use `dvc repro --allow-missing` and `dvc pull --allow-missing`"
        )
    else:
        print(f"{total / 1e9:.3f} GB would be deleted; run again with --delete")


@lock_app.command("merge")
def lock_merge(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BASE OURS THEIRS]", help="three versions, as Git passes them to a merge driver"),
    ] = None,
) -> None:
    """Merge dvc.lock by entry: three files into OURS, or without arguments the versions of a merge in conflict."""
    from srpo.lineage.lock_merge import merge_files, merge_index

    if not files:
        merge_index(Path.cwd())
        print("dvc.lock: merged; now `git add dvc.lock`")
    elif len(files) == 3:
        merge_files(*files)
    else:
        raise UserError("lock merge: takes three files, or none after a merge in conflict")


@app.command(rich_help_panel=PANEL)
def version() -> None:
    """Print the version."""
    print(__version__)
