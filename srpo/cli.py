"""The command line: thin commands over the stages. What computes is imported by the command that uses it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from srpo import __version__
from srpo.config.loader import PARAMS_FILE, Params, load_params
from srpo.errors import UserError, hindrance
from srpo.rounds import BASE, Round
from srpo.runtime import distributed
from srpo.runtime.round_lock import lock_round

app = typer.Typer(
    name="srpo",
    help="Fine-tune SDXL toward human preference by rejection sampling, in rounds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
prompts = typer.Typer(no_args_is_help=True, help="Bring prompts into the project.")
app.add_typer(prompts, name="prompts")
RoundKey = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml")]
RoundOrBase = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml, or base")]


def run(argv: list[str]) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    # of several processes the first draws a bar; the others' lines take its place until it is drawn again
    over_bar = distributed.rank() > 0 and sys.stderr.isatty()
    form = "\r\x1b[K%(message)s" if over_bar else "%(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)
    for chatty in ("alembic", "mlflow", "httpx", "transformers", "datasets"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)  # its errors are raised, too
    try:
        code = app(args=argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        if distributed.is_worker():
            distributed.tell_parent(error)
        else:
            print(f"srpo: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        if not distributed.is_worker():
            print("srpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors, wherever this typer keeps its click
            print(f"srpo: error: {error.format_message()}", file=sys.stderr)
            return 2
        if told := hindrance(error):
            if distributed.is_worker():
                distributed.tell_parent(told)
                return distributed.BLOCKED
            print(f"srpo: error: {told}", file=sys.stderr)
            return 1
        raise


def _project() -> tuple[Params, Path]:
    return load_params(PARAMS_FILE), Path.cwd()


@contextmanager
def _round(key: str, stage: str | None = None) -> Iterator[Round]:
    """Resolve a round of the project here and, for a stage, hold its lock."""
    params, root = _project()
    if key == BASE and stage not in ("base", "evaluate"):
        params.for_round(key)  # refuses it
    round = Round.of(params, root, key)
    with lock_round(round.files, stage) if stage else nullcontext():
        yield round


@app.command()
def base() -> None:
    """Record which base model and reward models these rounds use."""
    from srpo.stages.base import pin_base

    with _round(BASE, "base") as round:
        pin_base(round)


@app.command()
def generate(
    key: RoundKey,
    shards: Annotated[str | None, typer.Option(hidden=True, help="only these shards, shared by all workers")] = None,
) -> None:
    """Make N candidate images for every train prompt."""
    with _round(key, "generate") as round:
        from srpo.stages.generate import generate

        generate(round, None if shards is None else [int(number) for number in shards.split(",")])


@app.command()
def score(key: RoundKey) -> None:
    """Score every candidate with every reward model."""
    with _round(key, "score") as round:
        from srpo.stages.score import score

        score(round)


@app.command()
def select(key: RoundKey) -> None:
    """Keep the best candidate of every prompt."""
    with _round(key, "select") as round:
        from srpo.stages.select import select

        select(round)


@app.command()
def train(key: RoundKey) -> None:
    """Fine-tune on the winners."""
    with _round(key, "train") as round:
        from srpo.data.parquet import shards
        from srpo.stages.train import train
        from srpo.tracking import sync

        shards(round.files.winners)  # else MLflow would record a training that can't start
        with sync.live(round) as curve:
            train(round, curve.log)


@app.command()
def evaluate(key: RoundOrBase) -> None:
    """Sample the eval prompts and measure."""
    with _round(key, "evaluate") as round:
        from srpo.stages.evaluate import evaluate
        from srpo.tracking import sync

        evaluate(round)
        sync.project(round)


@app.command()
def report(key: RoundKey) -> None:
    """Write the round's report page."""
    with _round(key, "report") as round:
        from srpo.stages.report import report
        from srpo.tracking import sync

        report(round)
        sync.project(round)


@app.command("score-images")
def score_images(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of png, jpg and webp pictures")],
    reward: Annotated[
        list[str],
        typer.Option(help="a reward of params.yaml, a family (pickscore), or kind=model[@revision]; repeat for more"),
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="prompt file; a picture's file name is its prompt's <id> or <id>-<number>")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="one prompt for all pictures")] = None,
    out: Annotated[Path, typer.Option(help="parquet file to write: one row a picture")] = Path("image-scores.parquet"),
) -> None:
    """Score any folder of pictures with any rewards; needs no project."""
    from srpo.tools.score_images import score_folder

    score_folder(folder, reward, prompts, prompt, out)


@app.command()
def review(
    key: RoundKey,
    against: Annotated[str, typer.Option(metavar="ROUND", help="what to compare the round with")] = BASE,
    port: Annotated[int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0 takes any free one")] = 8765,
) -> None:
    """Serve pages to pick winners, compare two models blindly and browse candidates, on this machine only."""
    from srpo.review.server import serve

    with _round(key) as round:
        serve(round, against, port)


@app.command()
def picks(key: RoundKey) -> None:
    """Write one choice per prompt from what all raters picked, for select to use."""
    from srpo.review.freeze import freeze_picks

    with _round(key) as round:
        frozen = freeze_picks(round)
    print(
        f"{frozen.picked} prompts with a pick, {frozen.all_bad} all bad, {frozen.divided} left to the rewards (a tie)"
    )
    print(f'in params.yaml, rounds."{key}":  select: {{picks: {frozen.path.relative_to(round.root).as_posix()}}}')


@app.command()
def votes(key: RoundKey) -> None:
    """Print what people decided about a round: win rate, agreement of raters, and of people with each reward."""
    from rich.console import Console
    from rich.table import Table

    from srpo.review.results import results

    with _round(key) as round:
        found = results(round)
    console = Console()
    for part in found:
        table = Table(title=part.title, caption=part.note, title_justify="left", caption_justify="left")
        for number, name in enumerate(part.columns):
            table.add_column(name, justify="right" if number else "left")
        for row in part.rows:
            table.add_row(*row)
        console.print(table if part.rows else f"{part.title}: {part.note}")


@app.command()
def track() -> None:
    """Rebuild all of MLflow's records from rounds/ and dvc.lock."""
    params, root = _project()
    from srpo.tracking import sync

    if not sync.sync(params, root):
        raise typer.Exit(1)


@app.command()
def campaign() -> None:
    """Write rounds/index.html: all evaluated rounds on one page."""
    params, root = _project()
    from srpo.reporting.campaign_page import write_campaign

    print(write_campaign(params, root).relative_to(root))


@app.command()
def table() -> None:
    """Print all evaluated rounds, one line each, and where to look further."""
    params, root = _project()
    from rich.console import Console

    from srpo.reporting.table import addresses, campaign_rows, render

    rows, console = campaign_rows(root, params), Console()
    if not rows:
        raise UserError("rounds/: no round is evaluated yet; `make demo` or `dvc repro` runs them")
    console.print(render(rows))
    for name, value in addresses(params, rows[-1]["round"]).items():
        console.print(f"{name + ':':9} {value}", highlight=False, soft_wrap=True)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder to make the project in")] = Path(),
    preset: Annotated[str, typer.Option(help="sdxl, or tiny (from a clone of the repository only)")] = "sdxl",
) -> None:
    """Start a project: params.yaml from a preset, the pipeline, Git and DVC. Overwrites nothing."""
    from srpo.scaffold.init import init_project, next_steps

    print(f"wrote {', '.join(init_project(folder, preset))} under {folder.resolve()}")
    print(f"next: {next_steps(preset)}")


@app.command()
def check() -> None:
    """Look for what would go wrong before hours are spent, and estimate hours, memory and disk."""
    params, root = _project()
    from srpo.preflight.checks import check_project

    findings = check_project(params, root)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.state:4}  {finding.what:{width}}  {finding.text}")
    failed = sum(finding.state == "fail" for finding in findings)
    if failed:
        raise UserError(f"{failed} of {len(findings)} checks failed; mend what says fail above")


@prompts.command("import")
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
    params, root = _project()
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


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def lineage(
    which: Annotated[
        str, typer.Argument(metavar="ROUND|VERSION", help="a round, or a version or alias of the registry")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
    check: Annotated[bool, typer.Option(help="hash what is on disk and mark what is missing or differs")] = True,
) -> None:
    """Print what a round or a registered version was made from, back to base and prompts."""
    params, root = _project()
    from rich.console import Console

    from srpo.lineage import graph
    from srpo.release import registry

    found = registry.chain_of(params, root, which)
    if check:
        graph.verify(root, found)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        Console(width=max(120, Console().width)).print(graph.render(found))


@app.command()
def restore(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a version or alias of the registry")],
    to: Annotated[Path | None, typer.Option(help="folder to make; default restored/<version>")] = None,
) -> None:
    """Bring back exactly the adapter of a registered version from DVC."""
    params, root = _project()
    from srpo.release.restore import restore

    print(restore(params, root, version, to))


@app.command()
def export(
    key: RoundKey,
    to: Annotated[Path, typer.Option(help="folder to make")],
    merged: Annotated[bool, typer.Option(help="write the whole pipeline, too, with the tuned weights in it")] = False,
) -> None:
    """Write a round for others to use: weights, pictures, model card."""
    from srpo.release.export import export

    with _round(key) as round:
        print(f"{to}: {', '.join(export(round, to, merged))}")
