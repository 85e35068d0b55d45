"""`srpo score-images`: any folder of pictures, any rewards, no project needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError

from srpo.config.loader import PARAMS_FILE, load_params
from srpo.config.schema import RewardParams, RuntimeParams
from srpo.data.prompts import load_prompts
from srpo.errors import UserError
from srpo.rewards.families import FAMILIES, find_family

if TYPE_CHECKING:
    from rich.table import Table

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BATCH = 16


def score_folder(
    folder: Path, rewards: Sequence[str], prompts: Path | None, prompt: str | None, out: Path
) -> pl.DataFrame:
    """Score every picture of `folder` itself, write the scores to `out`, print a table of them.

    Args:
        folder: its png, jpg and webp files are read; folders in it are not.
        rewards: names in params.yaml, families with a published model, or `kind=model[@revision]`.
        prompts: prompt file; the picture `<id>.png` or `<id>-<number>.png` belongs to its line `<id>`.
        prompt: one prompt for all, instead of `prompts`.
        out: parquet file, replaced when it exists.

    Returns:
        file, prompt_id (null with `prompt`), prompt, a float32 column per reward, invalid (one flat color).

    Raises:
        UserError: no pictures, a picture without prompt or unreadable, an unknown or failing reward.
    """
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a parquet file")
    if blocking := next((part for part in out.absolute().parents if part.exists() and not part.is_dir()), None):
        raise UserError(f"--out: {out} would lie in {blocking.name}, which is a file; name another")
    files = find_images(folder)
    rows = match_prompts(files, prompts, prompt)
    specs, runtime = reward_specs(rewards)
    table = _score(files, rows, specs, runtime)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(out)
    from rich.console import Console

    console = Console()
    console.print(summary_table(table, list(specs)))
    invalid = table["invalid"].sum()
    note = f", {invalid} of one flat color" if invalid else ""
    console.print(f"{table.height} pictures{note}; all scores: {out}", highlight=False, soft_wrap=True)
    return table


def find_images(folder: Path) -> list[Path]:
    """The pictures of a folder, in name order.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no picture; {', '.join(sorted(SUFFIXES))} are read")
    return found


def match_prompts(files: Sequence[Path], prompts: Path | None, prompt: str | None) -> list[dict[str, str | None]]:
    """`prompt_id` and `prompt` of every file.

    Raises:
        UserError: not just one of the two sources is given, or a file fits no prompt of the prompt file.
    """
    if (prompts is None) == (prompt is None):
        raise UserError("--prompts: give a prompt file, or one --prompt for all pictures (and not both)")
    if prompts is None:
        return [{"prompt_id": None, "prompt": prompt}] * len(files)
    texts = {line.id: line.prompt for line in load_prompts(prompts)}
    rows: list[dict[str, str | None]] = []
    for file in files:
        key = file.stem if file.stem in texts else re.sub(r"-\d+$", "", file.stem)
        if key not in texts:
            raise UserError(f"{file}: no prompt with id {key!r} in {prompts}; name pictures <id> or <id>-<number>")
        rows.append({"prompt_id": key, "prompt": texts[key]})
    return rows


def reward_specs(rewards: Sequence[str]) -> tuple[dict[str, RewardParams], RuntimeParams]:
    """The sections that `--reward` arguments stand for, by column name, and the hardware settings to use.

    params.yaml is read only when an argument is a bare name and the file exists.

    Raises:
        UserError: an argument names no reward.
    """
    bare = [name for name in rewards if "=" not in name]
    params = load_params() if bare and Path(PARAMS_FILE).exists() else None
    known = params.rewards if params else {}
    specs: dict[str, RewardParams] = {}
    for text in rewards:
        kind, _, model = text.partition("=")
        name = kind if kind not in specs else text
        if text in known:
            specs[name] = known[text]
        elif not model and kind in FAMILIES and FAMILIES[kind].model is None:
            raise UserError(f"--reward: {kind} has no published model; write {kind}=model")
        else:
            specs[name] = _spec(text, kind, model, list(known))
    return specs, params.runtime if params else RuntimeParams()


def _spec(text: str, kind: str, model: str, known: list[str]) -> RewardParams:
    revision = None
    if "@" in model and not Path(model).exists():
        model, _, revision = model.rpartition("@")
    try:
        find_family(kind)
        return RewardParams(kind=kind, model=model or None, revision=revision, role="judge")
    except UserError as error:
        here = f"; {PARAMS_FILE} has {', '.join(known)}" if known else ""
        raise UserError(f"--reward: {error}{here}") from None
    except ValidationError:
        raise UserError(f"--reward: {text!r} can't be read; write kind=model[@revision]") from None


def summary_table(table: pl.DataFrame, rewards: Sequence[str]) -> Table:
    """For the terminal, a line a reward: mean, spread, extremes and the files that have them."""
    from rich.table import Table

    shown = Table(title=f"{table.height} pictures")
    for name in ("reward", "mean", "std", "min", "max", "best", "worst"):
        shown.add_column(name, justify="left" if name in ("reward", "best", "worst") else "right", overflow="fold")
    for name in rewards:
        finite = table.filter(pl.col(name).is_finite()).sort([name, "file"], descending=[True, False])
        if finite.is_empty():
            shown.add_row(name, *["-"] * 6)
            continue
        column = finite[name].cast(pl.Float64)
        numbers = (column.mean(), column.std(ddof=0), column.min(), column.max())
        shown.add_row(name, *(f"{value:.3f}" for value in numbers), finite["file"][0], finite["file"][-1])
    return shown


def _score(
    files: list[Path], rows: list[dict[str, str | None]], specs: dict[str, RewardParams], runtime: RuntimeParams
) -> pl.DataFrame:
    import torch
    from tqdm import tqdm

    from srpo.rewards.batches import is_flat, score_batch
    from srpo.rewards.loading import load_rewards

    rewards = load_rewards(specs, runtime, Path.cwd())
    scored = []
    with tqdm(total=len(files), unit="img", desc="score-images", mininterval=2) as progress:
        for part, pixels in _batches(files):
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            members = [rows[i] for i in part]
            scores = score_batch(rewards, images, [row["prompt"] for row in members])
            columns = {name: values.tolist() for name, values in scores.items()}
            columns["invalid"] = is_flat(images).tolist()
            for place, (i, row) in enumerate(zip(part, members, strict=True)):
                values = {name: column[place] for name, column in columns.items()}
                scored.append({"file": files[i].name} | row | values)
            progress.update(len(part))
    schema = dict.fromkeys(("file", "prompt_id", "prompt"), pl.String) | dict.fromkeys(rewards, pl.Float32)
    return pl.DataFrame(scored, schema=schema | {"invalid": pl.Boolean})


def _batches(files: list[Path]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Runs of neighbours of one size, 16 at most: their places in `files`, and uint8 [n, height, width, 3]."""
    for start in range(0, len(files), BATCH):
        part = range(start, min(start + BATCH, len(files)))
        pictures = {i: read_image(files[i]) for i in part}
        for _, group in groupby(part, key=lambda i: pictures[i].shape):
            places = list(group)
            yield places, np.stack([pictures[i] for i in places])


def read_image(path: Path) -> np.ndarray:
    """uint8 [height, width, 3], upright, transparent parts on white.

    Raises:
        UserError: it is no readable picture.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({' '.join(str(error).split()):.120})") from None
