"""The commands of the stages in dvc.yaml."""

from __future__ import annotations

from srpo.cli.common import RoundKey, RoundOrBase, app, open_round
from srpo.rounds import BASE

PANEL = "Stages of a round"


@app.command(rich_help_panel=PANEL)
def base() -> None:
    """Record the base model and the reward models of all rounds."""
    from srpo.stages.base import pin_base

    with open_round(BASE, "base") as round:
        pin_base(round)


@app.command(rich_help_panel=PANEL)
def generate(key: RoundKey) -> None:
    """Sample N candidate images per train prompt."""
    with open_round(key, "generate") as round:
        from srpo.stages.generate import generate

        generate(round)


@app.command(rich_help_panel=PANEL)
def score(key: RoundKey) -> None:
    """Score every candidate with every reward model."""
    with open_round(key, "score") as round:
        from srpo.stages.score import score

        score(round)


@app.command(rich_help_panel=PANEL)
def select(key: RoundKey) -> None:
    """Select the best candidate of each prompt."""
    with open_round(key, "select") as round:
        from srpo.stages.select import select

        select(round)


@app.command(rich_help_panel=PANEL)
def train(key: RoundKey) -> None:
    """Fine-tune on the winners."""
    with open_round(key, "train") as round:
        from srpo.data.parquet import shards
        from srpo.stages.train import train
        from srpo.tracking.live import live

        shards(round.files.winners)  # else MLflow would record a training that can't start
        with live(round) as on_step:
            train(round, on_step)


@app.command(rich_help_panel=PANEL)
def evaluate(key: RoundOrBase) -> None:
    """Sample the eval prompts and compute metrics."""
    with open_round(key, "evaluate") as round:
        from srpo.stages.evaluate import evaluate
        from srpo.tracking.sync import sync_round

        evaluate(round)
        if key == BASE:  # of rounds once stage gate has decided
            sync_round(round)


@app.command(rich_help_panel=PANEL)
def gate(key: RoundKey) -> None:
    """Decide whether the round passes."""
    with open_round(key, "gate") as round:
        from srpo.stages.gate import gate
        from srpo.tracking.sync import sync_round

        gate(round)
        sync_round(round)


@app.command(rich_help_panel=PANEL)
def report(key: RoundKey) -> None:
    """Write the round's report page."""
    with open_round(key, "report") as round:
        from srpo.stages.report import report
        from srpo.tracking.sync import sync_round

        report(round)
        sync_round(round)
