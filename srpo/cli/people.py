"""Commands for what people prefer: review pages, picks, votes, and a reward fitted to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srpo.cli.common import RoundKey, app, open_round, project
from srpo.rounds import BASE, Round

PANEL = "People's preferences"


@app.command(rich_help_panel=PANEL)
def review(
    key: RoundKey,
    against: Annotated[str, typer.Option(metavar="ROUND", help="what to compare the round with")] = BASE,
    port: Annotated[int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0 takes any free one")] = 8765,
) -> None:
    """Serve pages to pick winners, compare two models blindly and browse candidates, on this machine only."""
    from srpo.review.server import serve

    with open_round(key) as round:
        serve(round, against, port)


@app.command(rich_help_panel=PANEL)
def picks(key: RoundKey) -> None:
    """Write one choice per prompt from what all raters picked, for select to use."""
    from srpo.review.freeze import freeze_picks

    with open_round(key) as round:
        frozen = freeze_picks(round)
    print(
        f"{frozen.picked} prompts with a pick, {frozen.all_bad} all bad, {frozen.divided} left to the rewards (a tie)"
    )
    print(f'in params.yaml, rounds."{key}":  select: {{picks: {frozen.path.relative_to(round.root).as_posix()}}}')


@app.command(rich_help_panel=PANEL)
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

    with open_round(key) as round:
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


@app.command("fit-reward", rich_help_panel=PANEL)
def fit_reward(
    rounds: Annotated[
        list[str] | None, typer.Argument(metavar="[ROUND]...", help="whose picks and votes; default all")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="a Hub id or a local folder; default OpenAI's ViT-L/14")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of --clip")] = None,
    to: Annotated[Path, typer.Option(help="folder to write")] = Path("data/fitted-reward"),
) -> None:
    """Fit a reward to what people picked and voted for, and write it as a folder for `kind: head`."""
    params, root = project()
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
