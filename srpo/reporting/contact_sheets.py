"""Pictures beside pictures: which ones to compare, and the contact sheets that show them. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from PIL import Image, ImageDraw, ImageFont

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.errors import UserError
from srpo.rounds import BASE, RoundFiles

PAPER, INK, FAINT = (255, 255, 255), (25, 27, 31), (110, 116, 125)
PAIRS, COLUMNS, GAP = 12, 4, 14
TINY, LARGE = 128, 256  # pixels: tiny pictures are enlarged up to the first, larger ones reduced to the second
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two pictures to compare, what was asked for, and the lines of text under each."""

    left: Image.Image
    right: Image.Image
    prompt: str
    left_lines: tuple[str, ...]
    right_lines: tuple[str, ...]


def winners_and_losers(params: Params, files: RoundFiles, count: int = PAIRS) -> list[Pair]:
    """Winner and loser of prompts spread evenly over all margins, widest first, with every reward's score.

    Raises:
        UserError: winners, candidates or scores are missing or do not belong together.
    """
    names = [*params.reward_names("select"), *params.reward_names("judge")]
    winners = parquet.table(files.winners, ["candidate_id", "prompt", "margin", "loser_id", *names])
    winners = winners.sort(["margin", "candidate_id"], descending=[True, False])
    chosen = [winners.row(i, named=True) for i in _spread(range(winners.height), count)]
    losers = [row["loser_id"] for row in chosen]
    left = _pictures(files.winners, [row["candidate_id"] for row in chosen])
    right = _pictures(files.candidates, losers)
    known = parquet.scan(files.scores, ["candidate_id", *names]).filter(pl.col("candidate_id").is_in(losers)).collect()
    scores = {row["candidate_id"]: row for row in known.iter_rows(named=True)}
    if not scores.keys() >= set(losers):
        raise UserError(f"{files.scores}: lacks the scores of losers that {files.winners} names; rerun score")

    def lines(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{name} {row[name]:.2f}" for name in names)

    return [
        Pair(
            left[row["candidate_id"]],
            right[row["loser_id"]],
            row["prompt"],
            lines(row),
            lines(scores[row["loser_id"]]),
        )
        for row in chosen
    ]


def before_and_after(root: Path, key: str, count: int = PAIRS) -> list[Pair]:
    """Base's picture and this round's for the same held-out prompt and the same noise.

    Raises:
        UserError: samples of base or of the round are missing or damaged, or share no prompt.
    """
    found = held_out(root, (BASE, key), count)
    if not found:
        raise UserError(f"rounds/{key}/evaluation: its samples share no prompt with base's; rerun evaluate")
    return [Pair(images[BASE], images[key], prompt, (BASE,), (f"round {key}",)) for prompt, images in found]


def held_out(root: Path, keys: Sequence[str], count: int) -> list[tuple[str, dict[str, Image.Image]]]:
    """Held-out prompts, evenly spread over those that all of `keys` have, with every round's first picture.

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


def contact_sheet(pairs: Sequence[Pair], title: str, left: str, right: str) -> Image.Image:
    """A sheet of pairs, four a row, under a title and a legend that says what left and right are."""
    thumbs = [(thumbnail(pair.left), thumbnail(pair.right)) for pair in pairs]
    side = max(max(image.size) for both in thumbs for image in both)
    lines = max(len(text) for pair in pairs for text in (pair.left_lines, pair.right_lines))
    width, height = 2 * side + 4, side + 16 * lines + 42
    columns = min(COLUMNS, len(pairs))
    rows, top = -(-len(pairs) // columns), 68
    sheet = Image.new("RGB", (max(560, columns * (width + GAP) + GAP), top + rows * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 12), title, INK, font(20))
    pen.text((GAP, 40), f"left: {left}    right: {right}", FAINT, font(14))
    for number, (pair, both) in enumerate(zip(pairs, thumbs, strict=True)):
        x = GAP + (number % columns) * (width + GAP)
        y = top + (number // columns) * (height + GAP)
        for offset, image, text in zip((0, side + 4), both, (pair.left_lines, pair.right_lines), strict=True):
            sheet.paste(image, (x + offset, y))
            for line, words in enumerate(text):
                pen.text((x + offset, y + side + 4 + 16 * line), _fit(pen, words, side, 12), FAINT, font(12))
        for line, words in enumerate(_wrap(pen, pair.prompt, width, 13, lines=2)):
            pen.text((x, y + side + 6 + 16 * (lines + line)), words, INK, font(13))
    return sheet


def thumbnail(image: Image.Image) -> Image.Image:
    """Tiny pictures by a whole factor, so that every pixel stays a square; large ones averaged down to 256."""
    longest = max(image.size)
    if longest <= TINY:
        factor = TINY // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    return small


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib carries, so that sheets look the same everywhere."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _pictures(path: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    # a dataset of 1024 px candidates is far larger than memory: only the row groups of those asked for are read
    places = parquet.find_candidates(path, pl.Series(ids, dtype=pl.String))["row"].to_numpy()
    found = parquet.RowReader(path).take(places, ["candidate_id", "image"])
    rows = [row for table in found for row in table.to_pylist()]
    pictures = {row["candidate_id"]: decode_image(row["image"]) for row in rows}
    if missing := set(ids) - pictures.keys():
        raise UserError(f"{path}: lacks {sorted(missing)[0]!r}; candidates, scores and winners are not of one run")
    return pictures


def _spread(items: Sequence[T], count: int) -> list[T]:
    """`count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    if pen.textlength(text, font(size)) <= width:
        return text
    while text and pen.textlength(f"{text}…", font(size)) > width:
        text = text[:-1]
    return f"{text}…"


def _wrap(pen: ImageDraw.ImageDraw, text: str, width: int, size: int, lines: int) -> list[str]:
    done, line = [], ""
    for word in text[:1000].split():  # more could never show
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font(size)) > width:
            done.append(line)
            longer = word
        line = longer
    done.append(line)
    kept = done[:lines]
    if len(done) > lines:
        kept[-1] = f"{kept[-1]} …"
    return [_fit(pen, part, width, size) for part in kept]
