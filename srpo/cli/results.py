"""Commands for results: tables and pages, MLflow, lineage, publication, and scores of any images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from srpo.cli.common import RoundKey, app, open_round, project
from srpo.errors import UserError

PANEL = "Results"


@app.command(rich_help_panel=PANEL)
def table() -> None:
    """Print a table of all evaluated rounds, and the addresses of reports and servers."""
    params, root = project()
    from rich.console import Console

    from srpo.reporting.table import addresses, best_rows, campaign_rows, findings, render

    rows, console = campaign_rows(root, params), Console()
    if not rows:
        raise UserError("rounds/: no round is evaluated yet; `make demo` or `dvc repro` runs them")
    console.print(render(rows, f"SRPO campaign, on held-out prompts at guidance {params.evaluate.guidance_scale:g}"))
    console.print(render(best_rows(root, params), "Each model at its own best guidance, and win rates"))
    for line in findings(rows):
        console.print(line, highlight=False)
    for name, value in addresses(params, rows[-1]["round"]).items():
        console.print(f"{name + ':':9} {value}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def campaign() -> None:
    """Write rounds/index.html: all evaluated rounds on one page."""
    params, root = project()
    from srpo.reporting.campaign_page import write_campaign

    print(write_campaign(params, root).relative_to(root))


@app.command(rich_help_panel=PANEL)
def track(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="first delete this project's runs in MLflow")] = False,
) -> None:
    """Add to MLflow what is missing of rounds/ and dvc.lock."""
    params, root = project()
    from srpo.tracking.sync import sync_campaign

    if not sync_campaign(params, root, rebuild):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def lineage(
    which: Annotated[
        str, typer.Argument(metavar="ROUND|VERSION", help="a round, or a version or alias of the registry")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
    check: Annotated[bool, typer.Option(help="hash the files on disk and mark missing and changed ones")] = True,
) -> None:
    """Print the inputs of a round or a registered version, back to base model and prompts."""
    params, root = project()
    from rich.console import Console

    from srpo.lineage import graph
    from srpo.release.provenance import provenance

    found = provenance(params, root, which)
    if check:
        graph.verify(root, found)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        Console(width=max(120, Console().width)).print(graph.render(found))


@app.command(rich_help_panel=PANEL)
def restore(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a version or alias of the registry")],
    to: Annotated[Path | None, typer.Option(help="folder to create; default restored/<version>")] = None,
) -> None:
    """Restore the adapter of a registered version from DVC, byte by byte."""
    params, root = project()
    from srpo.release.restore import restore

    print(restore(params, root, version, to))


@app.command(rich_help_panel=PANEL)
def export(
    key: RoundKey,
    to: Annotated[Path, typer.Option(help="folder to create")],
    merged: Annotated[bool, typer.Option(help="also write the whole pipeline with the tuned weights merged")] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="also write one merged file for ComfyUI, A1111 and Forge")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="of merged weights; auto as in runtime")
    ] = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload the folder to this repository of the Hub")
    ] = None,
    private: Annotated[bool, typer.Option(help="of a new repository: only its owner sees it")] = False,
) -> None:
    """Export a round for publication: weights, sample images and model card."""
    from srpo.release import hub_upload
    from srpo.release.export import export

    if push_to_hub:
        hub_upload.check_repository(push_to_hub)
    with open_round(key) as round:
        names = export(round, to, merged=merged, single_file=single_file, dtype=dtype)
    print(f"{to}: {', '.join(names)}")
    if push_to_hub:
        print(hub_upload.push_to_hub(to, push_to_hub, private=private))


@app.command("score-images", rich_help_panel=PANEL)
def score_images(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of PNG, JPEG and WebP images")],
    reward: Annotated[
        list[str],
        typer.Option(help="a reward of params.yaml, a family (pickscore), or kind=model[@revision]; repeat for more"),
    ],
    prompts: Annotated[Path | None, typer.Option(help="prompt file; images are named <id> or <id>-<number>")] = None,
    prompt: Annotated[str | None, typer.Option(help="one prompt for all images")] = None,
    out: Annotated[Path, typer.Option(help="parquet file to write, one row per image")] = Path("image-scores.parquet"),
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first unreadable image")] = False,
) -> None:
    """Score a folder of images with any rewards; no project is needed."""
    from srpo.tools.score_images import score_folder

    skipped = score_folder(folder, reward, prompts, prompt, out, strict)
    for line in skipped:
        print(f"srpo: skipped {line}", file=sys.stderr)
    if skipped:
        print(f"srpo: error: {len(skipped)} files are not readable images; all others are scored", file=sys.stderr)
        raise typer.Exit(1)
