"""Stage `evaluate`: the same prompts, seeds and guidance sweep for base and for every round."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.images import encode_images
from srpo.data.prompts import Prompt, check_disjoint, load_prompts
from srpo.data.records import read_sweep
from srpo.data.schemas import PER_PROMPT_FIELDS, SAMPLE_FIELDS, with_rewards
from srpo.errors import UserError
from srpo.evaluation.accumulator import Observation
from srpo.evaluation.bootstrap import Estimate, win_rate
from srpo.evaluation.features import load_extractors
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.gate import best_guidance, image_stat_shifts, judge_round
from srpo.evaluation.kernel import paired_kernel_distance
from srpo.evaluation.reference import load_reference
from srpo.lineage.record import check_base, require_weights
from srpo.rewards.batches import BATCH, batched
from srpo.rewards.loading import load_pinned_rewards
from srpo.rounds import BASE, Round, RoundFiles
from srpo.sampling.conditioning import PromptEmbeds
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler, sample_images
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed
from srpo.storage.json_files import write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger("srpo")
Place = tuple[Prompt, int]
"""A prompt and the number of a picture among the prompt's."""


def evaluate(round: Round) -> None:
    """Write `rounds/<key>/evaluation/`.

    metrics.json: flat headline numbers at the reported guidance, but win rates (over base, each model at its own
    best guidance, with the interval's lower end) and the verdict as in gate.json.
    guidance.csv: every measure with its interval at every guidance scale (`Observation.measures`).
    gate.json, not for base: the rules, win rates against base and parent, the pictures' drift in looks.
    per_prompt.parquet: every reward of every picture. samples.parquet: some pictures.
    features.safetensors, base only: features at the reported guidance, from which rounds measure their drift.

    Raises:
        UserError: bad prompt files, no adapter, or a model, reward or reference that can't be read.
    """
    files, settings = round.files, round.params.evaluate
    prompts = load_prompts(round.root / round.params.prompts.eval)
    check_disjoint(load_prompts(round.root / round.params.prompts.train), prompts)
    if (len(prompts) - 1) * settings.images_per_prompt < 2:
        raise UserError(f"{round.params.prompts.eval}: too few prompts for any interval; it needs at least 3")
    require_weights(round.files)
    rewards = load_pinned_rewards(round.params, round.root)
    extractors = load_extractors(round.params, round.root, rewards)
    references = {
        name: load_reference(round.root / settings.reference, extractor, round.root / ".srpo" / "cache")
        for name, extractor in extractors.items()
    }
    check_base(round.root)
    sampler = Sampler(round.params, files.adapter, fast=True)
    embeds = prompt_embeds(sampler, [prompt.prompt for prompt in prompts], round.root)
    scratch = scratch_folder(round.root, "evaluate", round.key)
    rows, samples, sweep, drift = [], [], {}, {}
    total = len(prompts) * settings.images_per_prompt * len(settings.guidance_scales)
    with tqdm(total=total, unit="img", desc=f"evaluate {round.key}", mininterval=2) as progress:
        for guidance in settings.guidance_scales:
            seen, reported = Observation(rewards, extractors, settings.features), guidance == settings.guidance_scale
            for images, places in _sample(sampler, embeds, prompts, guidance, round.params, progress):
                seen.add(images, places)
                if reported:
                    samples += _samples(images, places, {prompt.id for prompt in prompts[: settings.samples]})
            sweep[str(guidance)] = seen.measures(references, settings.clip_name)
            rows += [row | {"guidance": guidance} for row in seen.rows]
            if reported:
                drift = _drift(round.root, round.key, seen.features(settings.features), scratch)
    _write_samples(scratch / "samples.parquet", samples)
    _write_scores(scratch / "per_prompt.parquet", rows, list(rewards))
    _write_sweep(scratch / "guidance.csv", sweep)
    gate = None if round.key == BASE else _judge(round, sweep, pl.DataFrame(rows))
    if gate:
        write_json(scratch / "gate.json", gate)
    metrics = _headline(round.params, sweep[str(settings.guidance_scale)], drift, gate)
    write_json(scratch / "metrics.json", metrics)
    publish(scratch, files.evaluation)
    log.info("evaluate %s: %s", round.key, ", ".join(f"{name} {metrics[name]:.3f}" for name in [*rewards, "fid"]))
    if metrics["finding"] != "-":
        log.warning("evaluate %s: %s: the selecting reward rose and no judge followed", round.key, metrics["finding"])


def _sample(
    sampler: Sampler,
    embeds: PromptEmbeds,
    prompts: Sequence[Prompt],
    guidance: float,
    params: Params,
    progress: tqdm,
) -> Iterator[tuple[torch.Tensor, list[Place]]]:
    """Pictures uint8 [n, 3, height, width] and their places, a batch of the rewards at a time."""
    settings = params.evaluate
    places = [(row, index) for row in range(len(prompts)) for index in range(settings.images_per_prompt)]
    for batch in batched(places, BATCH):
        _, images = sample_images(
            sampler,
            embeds,
            [row for row, _ in batch],
            # no round in the seed: all rounds meet the same noise, so that they compare picture by picture
            [derive_seed(params.seed, "evaluate", prompts[row].id, index) for row, index in batch],
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=guidance,
            on_images=progress.update,
        )
        # in the memory order of decoded pictures, as the reference comes: the same pixels take the same way
        yield images.permute(0, 3, 1, 2), [(prompts[row], index) for row, index in batch]


def _drift(root: Path, key: str, features: np.ndarray, scratch: Path) -> dict[str, float]:
    """FID and KID against base's own pictures of the same prompts and noise; base leaves its features for that."""
    if key == BASE:
        save_with_checksum({"features": torch.from_numpy(features)}, scratch / "features.safetensors")
        return {"drift": 0.0, "drift_kid": 0.0}
    path = RoundFiles(root, BASE).evaluation / "features.safetensors"
    try:
        base = load_with_checksum(path)["features"].numpy()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); run `srpo evaluate base`, or `dvc checkout`") from None
    if base.shape != features.shape:
        raise UserError(f"{path}: {base.shape} features where this round has {features.shape}; evaluate base anew")
    drift = frechet_distance(gaussian(features), gaussian(base))
    return {"drift": drift, "drift_kid": paired_kernel_distance(features, base)}


def _judge(round: Round, sweep: Mapping[str, Mapping[str, float]], scores: pl.DataFrame) -> dict[str, Any]:
    """gate.json. Win rates are `best`: over base, each at its own best guidance; `base`, `parent`: at the reported."""
    base_sweep, reported = read_sweep(round.base_files), round.params.evaluate.guidance_scale
    columns = ["prompt_id", "index", "guidance", *round.params.rewards]
    base, parent = (
        parquet.table(RoundFiles(round.root, rival).evaluation / "per_prompt.parquet", columns)
        for rival in (BASE, round.parent)
    )
    best, rates = {}, {}
    for name in round.params.rewards:
        ours, theirs = float(best_guidance(sweep, name)), float(best_guidance(base_sweep, name))
        best[name] = _pair(scores, base, name, ours, theirs)
        rates[name] = {
            "best": best[name]._asdict() | {"guidance": ours, "base_guidance": theirs},
            "base": _pair(scores, base, name, reported, reported)._asdict(),
            "parent": _pair(scores, parent, name, reported, reported)._asdict(),
        }
    roles = ({name: best[name] for name in round.params.reward_names(role)} for role in ("judge", "select"))
    return judge_round(round.params.gate, sweep, base_sweep, *roles) | {
        "pictures_at": {
            "guidance": float(best_guidance(sweep, "fid")),
            "base_guidance": float(best_guidance(base_sweep, "fid")),
        },
        "win_rate": rates,
        "image_stats": image_stat_shifts(sweep, base_sweep),
    }


def _headline(
    params: Params, reported: Mapping[str, float], drift: Mapping[str, float], gate: Mapping[str, Any] | None
) -> dict[str, Any]:
    """metrics.json: few and flat, so that `dvc metrics show` is a table one can read."""
    names = ["images", *params.rewards, "fid", "kid", "cmmd", "diversity"]
    metrics = {"guidance": params.evaluate.guidance_scale} | {name: reported[name] for name in names} | drift
    if gate is None:
        return metrics | {"verdict": "-", "finding": "-"}
    for judge in params.reward_names("judge"):
        rate = gate["win_rate"][judge]["best"]
        metrics |= {f"{judge}_win_rate": rate["value"], f"{judge}_win_rate_low": rate["low"]}
    return metrics | {"verdict": gate["verdict"], "finding": gate["finding"] or "-"}


def _pair(scores: pl.DataFrame, other: pl.DataFrame, name: str, guidance: float, other_guidance: float) -> Estimate:
    def at(table: pl.DataFrame, value: float) -> pl.DataFrame:
        return table.filter((pl.col("guidance") - value).abs() < 1e-4).sort("prompt_id", "index")

    ours, theirs = at(scores, guidance), at(other, other_guidance)
    columns = (table[name].cast(pl.Float32).to_numpy() for table in (ours, theirs))
    return win_rate(*columns, ours["prompt_id"].to_list())


def _samples(images: torch.Tensor, places: Sequence[Place], kept: set[str]) -> list[dict[str, Any]]:
    chosen = [(image, place) for image, place in zip(images, places, strict=True) if place[0].id in kept]
    cells = encode_images(image.permute(1, 2, 0).numpy() for image, _ in chosen)
    return [
        {"prompt_id": prompt.id, "prompt": prompt.prompt, "index": index, "image": cell}
        for cell, (_, (prompt, index)) in zip(cells, chosen, strict=True)
    ]


def _write_samples(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(path, rows, SAMPLE_FIELDS)


def _write_scores(path: Path, rows: list[dict[str, Any]], rewards: list[str]) -> None:
    parquet.write_table(path, rows, with_rewards(PER_PROMPT_FIELDS, rewards))


def _write_sweep(path: Path, sweep: Mapping[str, Mapping[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["guidance", *next(iter(sweep.values()))])
        writer.writeheader()
        writer.writerows({"guidance": guidance} | dict(values) for guidance, values in sweep.items())
