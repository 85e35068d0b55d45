"""The command line. Each command imports the code it runs, so that `srpo --help` starts at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from srpo import __version__
from srpo.config.loader import PARAMS_FILE, Params, load_params
from srpo.errors import BlockedError, UserError, environment_error_message
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
lock_app = typer.Typer(help="Work with dvc.lock, the record of all stages.", no_args_is_help=True)
app.add_typer(lock_app, name="lock")
prompts_app = typer.Typer(no_args_is_help=True, help="Bring prompts into the project.")
app.add_typer(prompts_app, name="prompts")
candidates_app = typer.Typer(no_args_is_help=True, help="Bring candidates from elsewhere into a round.")
app.add_typer(candidates_app, name="candidates")
RoundKey = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml")]
RoundOrBase = Annotated[str, typer.Argument(metavar="ROUND", help="a key of `rounds` in params.yaml, or base")]


def run(argv: list[str]) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 bad input, 130 interrupted."""
    # the first of several processes draws a progress bar; lines of the others overwrite it until it is drawn again
    overwrites_bar = distributed.rank() > 0 and sys.stderr.isatty()
    line_format = "\r\x1b[K%(message)s" if overwrites_bar else "%(message)s"
    logging.basicConfig(level=logging.INFO, format=line_format, stream=sys.stderr, force=True)
    for library in ("alembic", "bitsandbytes", "mlflow", "httpx", "httpx2", "transformers", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # read when it is imported; it raises what it logs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(args=argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        if distributed.is_worker():
            distributed.report_to_parent(error)
        else:
            print(f"srpo: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        if not distributed.is_worker():
            print("srpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors; some versions of typer contain a copy of click
            print(f"srpo: error: {error.format_message()}", file=sys.stderr)
            return 2
        if message := environment_error_message(error):
            if distributed.is_worker():
                distributed.report_to_parent(message)
                return distributed.BLOCKED
            print(f"srpo: error: {message}", file=sys.stderr)
            return 1
        raise


def _project() -> tuple[Params, Path]:
    return load_params(PARAMS_FILE), Path.cwd()


@contextmanager
def _round(key: str, stage: str | None = None) -> Iterator[Round]:
    """Resolve a round of the project in this folder; for a stage, hold the round's lock and check its folder."""
    params, root = _project()
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


@app.command()
def base() -> None:
    """Record the base model and the reward models of all rounds."""
    from srpo.stages.base import pin_base

    with _round(BASE, "base") as round:
        pin_base(round)


@app.command()
def generate(key: RoundKey) -> None:
    """Sample N candidate images per train prompt."""
    with _round(key, "generate") as round:
        from srpo.stages.generate import generate

        generate(round)


@app.command()
def score(key: RoundKey) -> None:
    """Score every candidate with every reward model."""
    with _round(key, "score") as round:
        from srpo.stages.score import score

        score(round)


@app.command()
def select(key: RoundKey) -> None:
    """Select the best candidate of each prompt."""
    with _round(key, "select") as round:
        from srpo.stages.select import select

        select(round)


@app.command()
def train(key: RoundKey) -> None:
    """Fine-tune on the winners."""
    with _round(key, "train") as round:
        from srpo.data.parquet import shards
        from srpo.stages.train import train
        from srpo.tracking.live import live

        shards(round.files.winners)  # else MLflow would record a training that can't start
        with live(round) as curve:
            train(round, curve.log)


@app.command()
def evaluate(key: RoundOrBase) -> None:
    """Sample the eval prompts and compute metrics."""
    with _round(key, "evaluate") as round:
        from srpo.stages.evaluate import evaluate
        from srpo.tracking.sync import sync_round

        evaluate(round)
        if key == BASE:  # of rounds once stage gate has decided
            sync_round(round)


@app.command()
def gate(key: RoundKey) -> None:
    """Decide whether the round passes."""
    with _round(key, "gate") as round:
        from srpo.stages.gate import gate
        from srpo.tracking.sync import sync_round

        gate(round)
        sync_round(round)


@app.command()
def report(key: RoundKey) -> None:
    """Write the round's report page."""
    with _round(key, "report") as round:
        from srpo.stages.report import report
        from srpo.tracking.sync import sync_round

        report(round)
        sync_round(round)


@app.command("score-images")
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
def votes(
    key: RoundKey,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="write the votes against base to a file for the gate")
    ] = False,
) -> None:
    """Print what people decided about a round: win rate, agreement of raters, and of people with each reward."""
    from rich.console import Console
    from rich.table import Table

    from srpo.review.freeze import freeze_votes
    from srpo.review.results import results

    with _round(key) as round:
        if freeze:
            path, count = freeze_votes(round)
            print(f"{count} votes against base")
            print(f'in params.yaml, gate:  votes: {{"{key}": {path.relative_to(round.root).as_posix()}}}')
            return
        found = results(round)
    console = Console()
    for part in found:
        table = Table(title=part.title, caption=part.note, title_justify="left", caption_justify="left")
        for number, name in enumerate(part.columns):
            table.add_column(name, justify="right" if number else "left")
        for row in part.rows:
            table.add_row(*row)
        console.print(table if part.rows else f"{part.title}: {part.note}")


@app.command("fit-reward")
def fit_reward(
    rounds: Annotated[
        list[str] | None, typer.Argument(metavar="[ROUND]...", help="whose picks and votes; default all")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="a Hub id or a local folder; default OpenAI's ViT-L/14")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of --clip")] = None,
    to: Annotated[Path, typer.Option(help="folder to write")] = Path("data/fitted-reward"),
) -> None:
    """Fit a reward to what people picked and voted for, and write it as a folder for `kind: head`."""
    params, root = _project()
    from srpo.config.reward_families import CLIP_L
    from srpo.models.hub import Source
    from srpo.review.fit_reward import fit_reward

    source = Source(clip, revision) if clip else Source(*CLIP_L)
    found = fit_reward([Round.of(params, root, key) for key in rounds or params.rounds], source, root / to)
    print(
        f"{found.decisions} decisions about {found.prompts} prompts; agreement on held-out prompts"
        f" {found.agreement.value:.2f} ({found.agreement.low:.2f} to {found.agreement.high:.2f}), chance is 0.5"
    )
    print(f"in params.yaml, rewards:  people: {{kind: head, model: {to.as_posix()}, role: select}}")


@app.command()
def track(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="first delete this project's runs in MLflow")] = False,
) -> None:
    """Add to MLflow what is missing of rounds/ and dvc.lock."""
    params, root = _project()
    from srpo.tracking.sync import sync_campaign

    if not sync_campaign(params, root, rebuild):
        raise typer.Exit(1)


@app.command()
def campaign() -> None:
    """Write rounds/index.html: all evaluated rounds on one page."""
    params, root = _project()
    from srpo.reporting.campaign_page import write_campaign

    print(write_campaign(params, root).relative_to(root))


@app.command()
def table() -> None:
    """Print a table of all evaluated rounds, and the addresses of reports and servers."""
    params, root = _project()
    from rich.console import Console

    from srpo.reporting.table import addresses, campaign_rows, findings, render

    rows, console = campaign_rows(root, params), Console()
    if not rows:
        raise UserError("rounds/: no round is evaluated yet; `make demo` or `dvc repro` runs them")
    console.print(render(rows))
    for line in findings(rows):
        console.print(line, highlight=False)
    for name, value in addresses(params, rows[-1]["round"]).items():
        console.print(f"{name + ':':9} {value}", highlight=False, soft_wrap=True)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder of the project")] = Path(),
    preset: Annotated[str, typer.Option(help="sdxl, or tiny (in a clone of the repository only)")] = "sdxl",
) -> None:
    """Create a project: params.yaml from a preset, the pipeline, Git and DVC. Overwrites no file."""
    from srpo.scaffold.init import init_project, next_steps

    print(f"wrote {', '.join(init_project(folder, preset))} under {folder.resolve()}")
    print(f"next: {next_steps(preset)}")


@app.command()
def check() -> None:
    """Check models, data, DVC and MLflow before hours are spent; estimate hours, memory and disk."""
    params, root = _project()
    from srpo.preflight.checks import check_project

    results = check_project(params, root)
    width = max(len(result.name) for result in results)
    for result in results:
        print(f"{result.state:4}  {result.name:{width}}  {result.text}")
    if failed := sum(result.state == "fail" for result in results):
        raise UserError(f"{failed} of {len(results)} checks failed; fix the checks marked `fail` above")


@app.command()
def prune(
    rounds: Annotated[
        list[str] | None, typer.Argument(metavar="[ROUND]...", help="decided rounds; default all of them")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete; without it, only count bytes")] = False,
) -> None:
    """Delete the candidates of decided rounds from workspace, DVC cache and remote; all other outputs stay."""
    params, root = _project()
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

    with _round(key) as round:
        found = import_candidates(round, source, column, round.root / to)
    left_out = "".join(f"; left out {count} {name}" for name, count in found.left_out.items())
    print(f"{found.images} images of {found.prompts} prompts, {found.pairs} pairs{left_out}")
    folder = found.candidates.relative_to(round.root).as_posix()
    print(f'in params.yaml, rounds."{key}":  generate: {{candidates: {folder}}}')
    if found.picks:
        print(f"    select: {{picks: {found.picks.relative_to(round.root).as_posix()}}}")
    print(f"track them with `dvc add {folder}`, or with the folder that is under DVC already")


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
    check: Annotated[bool, typer.Option(help="hash the files on disk and mark missing and changed ones")] = True,
) -> None:
    """Print the inputs of a round or a registered version, back to base model and prompts."""
    params, root = _project()
    from rich.console import Console

    from srpo.lineage import graph
    from srpo.release import registry

    found = registry.provenance(params, root, which)
    if check:
        graph.verify(root, found)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        Console(width=max(120, Console().width)).print(graph.render(found))


@app.command()
def restore(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a version or alias of the registry")],
    to: Annotated[Path | None, typer.Option(help="folder to create; default restored/<version>")] = None,
) -> None:
    """Restore the adapter of a registered version from DVC, byte by byte."""
    params, root = _project()
    from srpo.release.restore import restore

    print(restore(params, root, version, to))


@app.command()
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
    with _round(key) as round:
        names = export(round, to, merged=merged, single_file=single_file, dtype=dtype)
    print(f"{to}: {', '.join(names)}")
    if push_to_hub:
        print(hub_upload.push_to_hub(to, push_to_hub, private=private))
