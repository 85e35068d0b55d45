"""`srpo score-images`: score a folder of images with any rewards; no project is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import ValidationError

from srpo.config.loader import PARAMS_FILE, load_params
from srpo.config.reward_families import FAMILIES, find_family
from srpo.config.schema import RewardParams, RuntimeParams
from srpo.data.image_files import StoredImage, read_image
from srpo.data.prompts import load_prompts
from srpo.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BATCH = 16


def score_folder(
    folder: Path, rewards: Sequence[str], prompts: Path | None, prompt: str | None, out: Path, strict: bool = False
) -> list[str]:
    """Score every image in `folder`, write the scores to `out`, print a table of them.

    Args:
        folder: its png, jpg and webp files are read, subfolders are not.
        rewards: names in params.yaml, families with a published model, or `kind=model[@revision]`.
        prompts: prompt file; the image `<id>.png` or `<id>-<number>.png` belongs to its line `<id>`.
        prompt: one prompt for all images, instead of `prompts`.
        out: parquet file; replaced if it exists.
        strict: an unreadable file is an error; otherwise it is skipped.

    The scores are file, prompt_id (null with `prompt`), prompt, a float32 column per reward, invalid (a single color).

    Returns:
        One line per skipped file.

    Raises:
        UserError: no readable image, an image without prompt, an unknown or failing reward; with `strict`, an
            unreadable image.
    """
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; give the path of a parquet file")
    if blocking := next((part for part in out.absolute().parents if part.exists() and not part.is_dir()), None):
        raise UserError(f"--out: {blocking} is a file, not a folder; give another path")
    files = find_images(folder)
    rows = match_prompts(files, prompts, prompt)
    specs, runtime = reward_specs(rewards)
    table, skipped = _score(files, rows, specs, runtime, strict)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(out)
    from rich.console import Console

    console = Console()
    console.print(summary_table(table, list(specs)))
    invalid = table["invalid"].sum()
    note = f", {invalid} of one flat color" if invalid else ""
    console.print(f"{table.height} images{note}; all scores: {out}", highlight=False, soft_wrap=True)
    return skipped


def find_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, in name order.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no images; {', '.join(sorted(SUFFIXES))} files are read")
    return files


def match_prompts(files: Sequence[Path], prompts: Path | None, prompt: str | None) -> list[dict[str, str | None]]:
    """Return `prompt_id` and `prompt` of every file.

    Raises:
        UserError: not exactly one of the two sources is given, or the prompt file has no prompt for an image.
    """
    if (prompts is None) == (prompt is None):
        raise UserError("--prompts: give either a prompt file, or one --prompt for all images")
    if prompts is None:
        return [{"prompt_id": None, "prompt": prompt}] * len(files)
    texts = {line.id: line.prompt for line in load_prompts(prompts)}
    rows: list[dict[str, str | None]] = []
    for file in files:
        key = file.stem if file.stem in texts else re.sub(r"-\d+$", "", file.stem)
        if key not in texts:
            raise UserError(f"{file}: no prompt with id {key!r} in {prompts}; name images <id> or <id>-<number>")
        rows.append({"prompt_id": key, "prompt": texts[key]})
    return rows


def reward_specs(rewards: Sequence[str]) -> tuple[dict[str, RewardParams], RuntimeParams]:
    """Return the sections that `--reward` arguments stand for, by column name, and the hardware settings.

    params.yaml is read only if an argument is a bare name and the file exists.

    Raises:
        UserError: an argument is not a reward.
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
        of_params = f"; {PARAMS_FILE} has {', '.join(known)}" if known else ""
        raise UserError(f"--reward: {error}{of_params}") from None
    except ValidationError:
        raise UserError(f"--reward: {text!r} is not valid; write kind=model[@revision]") from None


def summary_table(table: pl.DataFrame, rewards: Sequence[str]) -> Table:
    """Return a table for the terminal: per reward mean, standard deviation, extremes and their files."""
    from rich.table import Table

    summary = Table(title=f"{table.height} images")
    for name in ("reward", "mean", "std", "min", "max", "best", "worst"):
        summary.add_column(name, justify="left" if name in ("reward", "best", "worst") else "right", overflow="fold")
    for name in rewards:
        finite = table.filter(pl.col(name).is_finite()).sort([name, "file"], descending=[True, False])
        if finite.is_empty():
            summary.add_row(name, *["-"] * 6)
            continue
        column = finite[name].cast(pl.Float64)
        numbers: list[Any] = [column.mean(), column.std(ddof=0), column.min(), column.max()]
        summary.add_row(name, *(f"{value:.3f}" for value in numbers), finite["file"][0], finite["file"][-1])
    return summary


def _score(
    files: list[Path],
    rows: list[dict[str, str | None]],
    specs: dict[str, RewardParams],
    runtime: RuntimeParams,
    strict: bool,
) -> tuple[pl.DataFrame, list[str]]:
    """Return the scores, and one line per file that is not a readable image."""
    import torch
    from tqdm import tqdm

    from srpo.rewards.batches import is_flat, score_batch
    from srpo.rewards.loading import load_rewards

    rewards = load_rewards(specs, runtime, Path.cwd())
    scored: list[dict[str, Any]] = []
    skipped: list[str] = []
    with tqdm(total=len(files), unit="img", desc="score-images", mininterval=2) as progress:
        for part, pixels in _batches(files, skipped, strict):
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            members = [rows[i] for i in part]
            scores = score_batch(rewards, images, [row["prompt"] or "" for row in members])
            columns = {name: values.tolist() for name, values in scores.items()}
            columns["invalid"] = is_flat(images).tolist()
            for place, (i, row) in enumerate(zip(part, members, strict=True)):
                values = {name: column[place] for name, column in columns.items()}
                scored.append({"file": files[i].name} | row | values)
            progress.update(len(part))
    if not scored:
        raise UserError(f"{skipped[0]} (and {len(skipped) - 1} more): no image of the folder is readable")
    schema = dict.fromkeys(("file", "prompt_id", "prompt"), pl.String) | dict.fromkeys(rewards, pl.Float32)
    return pl.DataFrame(scored, schema=schema | {"invalid": pl.Boolean}), skipped


def _batches(files: list[Path], skipped: list[str], strict: bool) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield runs of consecutive images of one size, at most 16: their indices, and uint8 [n, height, width, 3].

    Files that are not readable images are left out, and their errors added to `skipped`; raised if `strict`.
    """
    for start in range(0, len(files), BATCH):
        images: dict[int, np.ndarray] = {}
        for i in range(start, min(start + BATCH, len(files))):
            try:
                images[i] = read_image(StoredImage(str(files[i]), files[i]))
            except UserError as error:
                if strict:
                    raise
                skipped.append(str(error))
        for _, group in groupby(images.items(), key=lambda item: item[1].shape):
            same_size = dict(group)
            yield list(same_size), np.stack(list(same_size.values()))
