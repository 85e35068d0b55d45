"""Image comparisons: which images are compared, and the contact sheets that show them."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.figure import Figure
from PIL import Image

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.data.scores import read_scores
from srpo.errors import UserError
from srpo.rounds import BASE, RoundFiles

PAIRS = 12
COLUMNS = 4
TINY = 128  # pixels: smaller images are enlarged up to this
LARGE = 256  # pixels: larger images are reduced to this
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, and the lines of text under each."""

    left: Image.Image
    right: Image.Image
    prompt: str
    left_lines: tuple[str, ...]
    right_lines: tuple[str, ...]


def winners_and_losers(params: Params, files: RoundFiles, count: int = PAIRS) -> list[Pair]:
    """Return winner and loser of prompts evenly spread over all margins, widest first, with every reward's score.

    Raises:
        UserError: winners, candidates or scores are missing or do not match.
    """
    names = [*params.reward_names("select"), *params.reward_names("judge")]
    winners = parquet.table(files.winners, ["candidate_id", "prompt", "margin", "loser_id"])
    winners = winners.sort(["margin", "candidate_id"], descending=[True, False])
    chosen = [winners.row(i, named=True) for i in _spread(range(winners.height), count)]
    losers = [row["loser_id"] for row in chosen]
    left = _images(files.winners, [row["candidate_id"] for row in chosen])
    right = _images(files.candidates, losers)
    shown = {*losers, *(row["candidate_id"] for row in chosen)}
    roles = {name: params.rewards[name].role for name in names}
    known = read_scores(files.scores, roles).filter(pl.col("candidate_id").is_in(list(shown)))
    scores = {row["candidate_id"]: row for row in known.iter_rows(named=True)}
    if scores.keys() != shown:
        raise UserError(f"{files.scores}: lacks scores of candidates that {files.winners} names; rerun score")

    def lines(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{name} {row[name]:.2f}" for name in names)

    return [
        Pair(
            left[row["candidate_id"]],
            right[row["loser_id"]],
            row["prompt"],
            lines(scores[row["candidate_id"]]),
            lines(scores[row["loser_id"]]),
        )
        for row in chosen
    ]


def before_and_after(root: Path, key: str, count: int = PAIRS) -> list[Pair]:
    """Return base's and this round's image of the same held-out prompts and the same noise.

    Raises:
        UserError: samples of base or of the round are missing or damaged, or share no prompt.
    """
    samples = held_out(root, (BASE, key), count)
    if not samples:
        raise UserError(f"rounds/{key}/evaluation: its samples share no prompt with base's; rerun evaluate")
    return [Pair(images[BASE], images[key], prompt, (BASE,), (f"round {key}",)) for prompt, images in samples]


def held_out(root: Path, keys: Sequence[str], count: int) -> list[tuple[str, dict[str, Image.Image]]]:
    """Return held-out prompts, evenly spread over those that all of `keys` have, with every round's first image.

    Raises:
        UserError: a round's samples are missing or damaged.
    """
    paths = {key: RoundFiles(root, key).evaluation / "samples.parquet" for key in keys}
    prompts = [
        {row["prompt_id"]: row["prompt"] for row in parquet.read_rows(path, ["prompt_id", "prompt", "index"])}
        for path in paths.values()
    ]
    chosen = _spread(sorted(set.intersection(*map(set, prompts))), count)
    images: dict[str, dict[str, Image.Image]] = {prompt: {} for prompt in chosen}
    for key, path in paths.items():
        for row in parquet.read_rows(path, ["prompt_id", "index", "image"]):
            if row["index"] == 0 and row["prompt_id"] in images:
                image = decode_image(row["image"])  # kept no larger than it is shown
                images[row["prompt_id"]][key] = image if max(image.size) <= TINY else thumbnail(image)
    return [(prompts[-1][prompt], images[prompt]) for prompt in chosen]


def save_contact_sheet(pairs: Sequence[Pair], title: str, left: str, right: str, path: Path) -> None:
    """Save a PNG of all pairs, four per row, under a title that says what left and right are.

    The same pairs give the same bytes.
    """
    columns = min(COLUMNS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    image = 1.6  # inches
    text = 0.45 + 0.14 * max(len(lines) for pair in pairs for lines in (pair.left_lines, pair.right_lines))
    height = 0.8 + rows * (image + text)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 8}):
        figure = Figure(figsize=(max(6.0, 3.4 * columns), height), dpi=100)
        figure.suptitle(f"{title}\nleft: {left}    right: {right}", fontsize=13, y=0.99, va="top", parse_math=False)
        axes = figure.subplots(rows, columns, squeeze=False)
        top = 1 - 1.1 / height
        bottom = (text - 0.3) / height
        figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.04, hspace=text / image)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, pair in zip(axes.flat, pairs, strict=False):
            # a prompt may hold anything: dollar signs are no formula, and its line breaks are spaces
            prompt = textwrap.fill(pair.prompt, 44, max_lines=2, placeholder=" …")
            axis.set_title(prompt, fontsize=9, parse_math=False)
            axis.imshow(_side_by_side(thumbnail(pair.left), thumbnail(pair.right)))
            for x, lines in ((0.25, pair.left_lines), (0.75, pair.right_lines)):
                axis.text(x, -0.03, "\n".join(lines), transform=axis.transAxes, ha="center", va="top", parse_math=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a prompt may have characters that the font lacks
            figure.savefig(path, metadata={"Software": None})


def _side_by_side(left: Image.Image, right: Image.Image) -> np.ndarray:
    gap = left.width // 20
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return np.asarray(both)


def thumbnail(image: Image.Image) -> Image.Image:
    """Return a tiny image enlarged by a whole factor, so that pixels stay squares, or a large one reduced to 256."""
    longest = max(image.size)
    if longest <= TINY:
        factor = TINY // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    return small


def _images(path: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    # a dataset of 1024 px candidates is far larger than memory: only the row groups of these candidates are read
    numbers = parquet.find_candidates(path, pl.Series(ids, dtype=pl.String))["row"].to_numpy()
    tables = parquet.RowReader(path).take(numbers, ["candidate_id", "image"])
    rows = [row for table in tables for row in table.to_pylist()]
    images = {row["candidate_id"]: decode_image(row["image"]) for row in rows}
    if missing := set(ids) - images.keys():
        raise UserError(f"{path}: lacks {sorted(missing)[0]!r}; candidates, scores and winners are not of one run")
    return images


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
