"""Contact sheets: pictures beside pictures, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (25, 27, 31), (110, 116, 125)
THUMB, GAP, COLUMNS = 144, 14, 4


@dataclass(frozen=True)
class Pair:
    """Two pictures to compare, what was asked for, and a line of text under each."""

    left: Image.Image
    right: Image.Image
    prompt: str
    left_text: str
    right_text: str


def contact_sheet(pairs: Sequence[Pair], title: str, left: str, right: str) -> Image.Image:
    """A sheet of pairs, four a row, under a title and a legend that says what left and right are."""
    cell_width, cell_height = 2 * THUMB + 4, THUMB + 58
    columns = min(COLUMNS, max(1, len(pairs)))
    rows = -(-len(pairs) // columns)
    top = 64
    size = (columns * (cell_width + GAP) + GAP, top + rows * (cell_height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 12), title, INK, font(20))
    pen.text((GAP, 38), f"left: {left}    right: {right}", FAINT, font(14))
    for number, pair in enumerate(pairs):
        x = GAP + (number % columns) * (cell_width + GAP)
        y = top + (number // columns) * (cell_height + GAP)
        sheet.paste(_thumb(pair.left), (x, y))
        sheet.paste(_thumb(pair.right), (x + THUMB + 4, y))
        pen.text((x, y + THUMB + 4), _fit(pen, pair.left_text, THUMB, 12), FAINT, font(12))
        pen.text((x + THUMB + 4, y + THUMB + 4), _fit(pen, pair.right_text, THUMB, 12), FAINT, font(12))
        for line, text in enumerate(_wrap(pen, pair.prompt, cell_width, 13, lines=2)):
            pen.text((x, y + THUMB + 21 + 16 * line), text, INK, font(13))
    return sheet


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib carries, so that sheets look the same everywhere."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _thumb(image: Image.Image) -> Image.Image:
    # tiny pictures keep their hard pixels, large ones are averaged
    method = Image.Resampling.NEAREST if image.width < THUMB else Image.Resampling.LANCZOS
    scale = THUMB / max(image.size)
    resized = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
    square = Image.new("RGB", (THUMB, THUMB), (236, 238, 241))
    square.paste(resized, ((THUMB - resized.width) // 2, (THUMB - resized.height) // 2))
    return square


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    if pen.textlength(text, font(size)) <= width:
        return text
    while text and pen.textlength(f"{text}…", font(size)) > width:
        text = text[:-1]
    return f"{text}…"


def _wrap(pen: ImageDraw.ImageDraw, text: str, width: int, size: int, lines: int) -> list[str]:
    done, line = [], ""
    for word in text.replace("\n", " ").split():
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
