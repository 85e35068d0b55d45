"""Making rounds that are ready to train, setting their params, and reading what training published."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from srpo.config.loader import Params, load_params
from srpo.rounds import Round, RoundFiles
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select


def ready(params: Params, root: Path, key: str) -> RoundFiles:
    """Make the winners of a round, with losers."""
    for stage in (generate, score, select):
        stage(Round.of(params, root, key))
    return RoundFiles(root, key)


def started(root: Path) -> Params:
    """Pin base and make round 001's winners; the project's params."""
    pin_base(Round.of(load_params(root / "params.yaml"), root, "base"))
    params = load_params(root / "params.yaml")
    ready(params, root, "001")
    return params


def with_train(params: Params, **values) -> Params:
    """The params with keys of `train` replaced."""
    return params.model_copy(update={"train": params.train.model_copy(update=values)})


def with_runtime(params: Params, **values) -> Params:
    """The params with keys of `runtime` replaced."""
    return params.model_copy(update={"runtime": params.runtime.model_copy(update=values)})


def write_train(root: Path, **values) -> None:
    """Set keys of the section `train` in params.yaml, for processes that read it."""
    path = root / "params.yaml"
    text = path.read_text()
    for name, value in values.items():
        text, found = re.subn(rf"(?m)^(train:(?:\n  .*)*?\n  {name}: ).*$", rf"\g<1>{value}", text)
        if not found:
            text = text.replace("train:\n  rank", f"train:\n  {name}: {value}\n  rank")
    path.write_text(text)


def contents(files: RoundFiles) -> dict[str, bytes]:
    """What training published, byte by byte."""
    return {file.name: file.read_bytes() for file in [files.training, *sorted(files.adapter.iterdir())]}


def losses(files: RoundFiles) -> list[float]:
    """The losses of training.csv."""
    return pl.read_csv(files.training)["loss"].to_list()
