"""Import of candidates: images with prompts from elsewhere, or pairs of images with labels, as a round's candidates."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from srpo.config.schema import ImageSize
from srpo.data import parquet
from srpo.data.image_files import SUFFIXES, StoredImage, read_image, stored_image
from srpo.data.images import encode_images
from srpo.data.imported import ROWS, imported_name
from srpo.data.prompt_cleaning import clean_prompt
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.errors import UserError, one_line
from srpo.rounds import Round
from srpo.sampling.sizes import allowed_sizes
from srpo.selection.picks import Pick, write_picks

PAIR = ("jpg_0", "jpg_1", "label_0", "label_1")
"""Columns of a preference data set in Pick-a-Pic's form, beside the prompt's."""
METADATA = "metadata.jsonl"
LABELED = "has_label"
RATER = "data set"


class Item(NamedTuple):
    """A prompt with one image, or with the two of a pair, the winner first."""

    prompt: str
    images: list[StoredImage]


@dataclass
class Imported:
    """What an import wrote.

    Attributes:
        candidates: the folder.
        picks: the file of the winners of pairs; None if there are no pairs.
        images, prompts, pairs: numbers.
        left_out: numbers by reason.
    """

    candidates: Path
    picks: Path | None = None
    images: int = 0
    prompts: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def import_candidates(round: Round, sources: Sequence[Path], column: str, to: Path) -> Imported:
    """Write `<to>/candidates-<hash>/` for `generate.candidates` and, for pairs, `review/<round>/picks-<hash>.jsonl`.

    Images are scaled and cropped in the center to the round's `generate.height` and `width`, or to that of its
    `generate.sizes` whose shape is closest to the prompt's first image, and kept losslessly. The prompt is cleaned as
    `srpo prompts import` does. Several images of one prompt are its candidates; every pair is a
    prompt of its own. Pairs without a winner are left out.

    Args:
        round: whose candidates they become.
        sources: parquet files, folders of parquet files, or folders of image files with captions.
        column: of the prompt.
        to: the folder to write to.

    Raises:
        UserError: a bad source, or no images.
    """
    settings = round.params.generate
    scratch = to / f".candidates-{round.key}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    found = Imported(to)
    items = (item for source in sources for item in _read(source, column, found.left_out))
    picks: list[Pick] = []
    try:
        rows = _rows(round.key, items, allowed_sizes(settings), found, picks)
        for number, first in enumerate(iter(lambda: list(islice(rows, ROWS)), [])):
            parquet.write_table(scratch / f"shard-{number:05d}.parquet", first, CANDIDATE_FIELDS)
        if not found.images:
            reasons = ", ".join(f"{count} {name}" for name, count in found.left_out.items()) or "they are empty"
            raise UserError(f"{', '.join(map(str, sources))}: no image to import; {reasons}")
        found.candidates = to / imported_name(scratch)
        shutil.rmtree(found.candidates, ignore_errors=True)
        scratch.rename(found.candidates)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if picks:
        found.picks = write_picks(round.files.review, picks)
    return found


def _rows(
    key: str, items: Iterator[Item], allowed: Sequence[ImageSize], found: Imported, picks: list[Pick]
) -> Iterator[dict[str, Any]]:
    """Yield the candidates' rows without latents, and note the winners of pairs in `picks`."""
    images: Counter[str] = Counter()
    sizes: dict[str, ImageSize] = {}
    pairs: Counter[str] = Counter()
    for item in items:
        text = clean_prompt(item.prompt).text
        if not text:
            found.left_out["without a prompt"] += 1
            continue
        prompt_id = f"p{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if len(item.images) > 1:
            found.pairs += 1
            pairs[prompt_id] += 1
            prompt_id = f"{prompt_id}-{pairs[prompt_id]}"
        pixels = [read_image(image) for image in item.images]
        size = sizes.setdefault(prompt_id, _closest(pixels[0], allowed))
        cells = encode_images(_fitted(image, size) for image in pixels)
        for number, cell in enumerate(cells):
            index = images[prompt_id]
            images[prompt_id] += 1
            candidate = f"{key}-{prompt_id}-{index:04d}"
            if number == 0 and len(cells) > 1:
                picks.append(Pick(prompt_id, candidate, hashlib.sha256(cell["bytes"]).hexdigest(), [RATER]))
            yield dict.fromkeys(CANDIDATE_FIELDS) | {
                "candidate_id": candidate, "prompt_id": prompt_id, "prompt": text, "index": index, "image": cell,
                "preview_scores": [], "audited": False,
            }  # fmt: skip
        found.images += len(cells)
    found.prompts = len(images)


def _closest(pixels: np.ndarray, allowed: Sequence[ImageSize]) -> ImageSize:
    """Return the size whose ratio of width to height is closest, so that least is cropped."""
    height, width = pixels.shape[:2]
    return min(allowed, key=lambda size: abs(math.log(size.width / size.height * height / width)))


def _fitted(pixels: np.ndarray, size: ImageSize) -> np.ndarray:
    """Return uint8 [height, width, 3] that `pixels` fill after scaling and cropping in the center."""
    image, sides = Image.fromarray(pixels), (size.width, size.height)
    return np.asarray(image if image.size == sides else ImageOps.fit(image, sides, Image.Resampling.LANCZOS))


def _read(source: Path, column: str, left_out: Counter[str]) -> Iterator[Item]:
    if source.is_dir() and not list(source.glob("*.parquet")):
        yield from _read_folder(source, column, left_out)
        return
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; name a parquet file, or a folder of these or of images")
    for shard in parquet.shards(source):
        try:
            with pq.ParquetFile(shard) as file:
                yield from _read_parquet(file, shard, column, left_out)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shard}: not a readable parquet file ({one_line(error):.120})") from None


def _read_parquet(file: pq.ParquetFile, shard: Path, column: str, left_out: Counter[str]) -> Iterator[Item]:
    names = file.schema_arrow.names
    are_pairs = set(PAIR) <= set(names)
    wanted = [column, *(PAIR if are_pairs else ["image"]), *([LABELED] if LABELED in names else [])]
    if missing := set(wanted) - set(names):
        raise UserError(f"{shard}: has no column {sorted(missing)[0]!r}; it has {', '.join(names)}")
    row = 0
    for batch in file.iter_batches(16, columns=wanted):
        for values in batch.to_pylist():
            cells = _cells(values) if are_pairs else [values["image"]]
            if cells is None:
                left_out["pairs without a winner"] += 1
            else:
                yield Item(values[column] or "", [stored_image(shard, row, cell) for cell in cells])
            row += 1


def _cells(values: dict[str, Any]) -> list[Any] | None:
    """Return a pair's winner and loser; None for a tie, or without a label."""
    first, second = values["label_0"], values["label_1"]
    if first is None or second is None or first == second or values.get(LABELED) is False:
        return None
    cells = [values["jpg_0"], values["jpg_1"]]
    return cells if first > second else cells[::-1]


def _read_folder(folder: Path, column: str, left_out: Counter[str]) -> Iterator[Item]:
    """Yield images with captions of metadata.jsonl (`file_name` and the column), else of a text file beside each."""
    metadata = folder / METADATA
    if metadata.exists():
        for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").splitlines(), start=1):
            try:
                row = json.loads(line)
                name, prompt = row["file_name"], row[column]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{metadata}:{number}: not an object with file_name and {column!r}") from None
            yield Item(str(prompt), [StoredImage(str(folder / name), folder / name)])
        return
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no images; a folder of {', '.join(sorted(SUFFIXES))} or parquet files is needed")
    for file in files:
        caption = file.with_suffix(".txt")
        if caption.exists():
            yield Item(caption.read_text(encoding="utf-8-sig", errors="replace"), [StoredImage(str(file), file)])
        else:
            left_out["without a prompt"] += 1
