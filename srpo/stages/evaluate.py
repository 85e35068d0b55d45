"""Stage `evaluate`: measure base and every round with the same prompts, seeds and guidance sweep."""

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
from srpo.data.prompts import Prompt, check_disjoint, load_prompts, negative_prompts
from srpo.data.records import read_sweep
from srpo.data.schemas import PER_PROMPT_FIELDS, SAMPLE_FIELDS, with_rewards
from srpo.errors import UserError
from srpo.evaluation.accumulator import MetricAccumulator, measure
from srpo.evaluation.bootstrap import Estimate, win_rate
from srpo.evaluation.features import load_extractors
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.gate import best_guidance, image_stat_shifts, judge_round
from srpo.evaluation.kernel import paired_kid
from srpo.evaluation.reference import load_reference
from srpo.lineage.record import check_base, require_weights
from srpo.models.tokenizer import load_tokenizer, text_read, warn_of_cut_prompts
from srpo.rewards.batches import BATCH, batched
from srpo.rewards.loading import load_pinned_rewards
from srpo.rounds import BASE, Round
from srpo.sampling.conditioning import PromptEmbeds
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler, sample_images
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed
from srpo.storage.json_files import write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
Place = tuple[Prompt, int]
"""A prompt and the number of an image among the prompt's."""


def evaluate(round: Round) -> None:
    """Write `rounds/<key>/evaluation/`.

    metrics.json: flat headline numbers at the reported guidance; win rates (over base, each model at its own best
    guidance, with the interval's lower end) and the verdict as in gate.json.
    guidance.csv: every metric with its interval at every guidance scale (`MetricAccumulator.compute`).
    gate.json, not for base: the rules, win rates over base and parent, shifts of image statistics.
    per_prompt.parquet: every score of every image. samples.parquet: some images.
    features.safetensors, base only: features at the reported guidance, from which the drift of rounds is computed.

    Raises:
        UserError: bad prompt files, no adapter, or an unreadable model, reward or reference.
    """
    files, settings = round.files, round.params.evaluate
    prompts = load_prompts(round.root / round.params.prompts.eval)
    tokenizer = load_tokenizer(round.params.model, round.root)
    check_disjoint(load_prompts(round.root / round.params.prompts.train), prompts, text_read(tokenizer))
    warn_of_cut_prompts(f"evaluate {round.key}", prompts, tokenizer)
    if (len(prompts) - 1) * settings.images_per_prompt < 2:
        raise UserError(f"{round.params.prompts.eval}: too few prompts for an interval; at least 3 are needed")
    require_weights(round.files)
    rewards = load_pinned_rewards(round.params, round.root)
    extractors = load_extractors(round.params, round.root, rewards)
    references = {
        name: load_reference(round.root / settings.reference, extractor, round.root / ".srpo" / "cache")
        for name, extractor in extractors.items()
    }
    check_base(round.root)
    sampler = Sampler(round.params, files.adapter, fast=True)
    negatives = negative_prompts(prompts, settings.negative_prompt)
    embeds = prompt_embeds(sampler, [prompt.prompt for prompt in prompts], round.root, negatives)
    scratch = scratch_folder(round.root, "evaluate", round.key)
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    sweep: dict[str, dict[str, float]] = {}
    drift: dict[str, float] = {}
    order = {name: number for number, name in enumerate(sorted(prompt.id for prompt in prompts))}
    total = len(prompts) * settings.images_per_prompt * len(settings.guidance_scales)
    with tqdm(total=total, unit="img", desc=f"evaluate {round.key}", mininterval=2) as progress:
        for guidance in settings.guidance_scales:
            accumulator = MetricAccumulator(list(rewards), references, settings.features, settings.clip_name)
            reported = guidance == settings.guidance_scale
            for images, places in _sample(sampler, embeds, prompts, guidance, round.params, progress):
                measured = measure(images, [prompt.prompt for prompt, _ in places], rewards, extractors)
                accumulator.update(measured, torch.tensor([order[prompt.id] for prompt, _ in places]))
                rows += _rows(places, measured.scores, guidance)
                if reported:
                    samples += _samples(images, places, {prompt.id for prompt in prompts[: settings.samples]})
            sweep[str(guidance)] = accumulator.compute()
            if reported:
                drift = _drift(round, accumulator.kid.arrays()[0], scratch)
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
        log.warning("evaluate %s: %s: the selecting reward rose, no judge did", round.key, metrics["finding"])


def _sample(
    sampler: Sampler,
    embeds: PromptEmbeds,
    prompts: Sequence[Prompt],
    guidance: float,
    params: Params,
    progress: tqdm,
) -> Iterator[tuple[torch.Tensor, list[Place]]]:
    """Yield images uint8 [n, 3, height, width] and their places, in batches of the rewards' size."""
    settings = params.evaluate
    places = [(row, index) for row in range(len(prompts)) for index in range(settings.images_per_prompt)]
    for batch in batched(places, BATCH):
        _, images = sample_images(
            sampler,
            embeds,
            [row for row, _ in batch],
            # no round in the seed: all rounds get the same noise, so that they are compared image by image
            [derive_seed(params.seed, "evaluate", prompts[row].id, index) for row, index in batch],
            settings.model_copy(update={"guidance_scale": guidance}),
            progress.update,
        )
        # in the memory order of decoded images, as in the reference: the same pixels give the same features
        yield images.permute(0, 3, 1, 2), [(prompts[row], index) for row, index in batch]


def _rows(places: Sequence[Place], scores: Mapping[str, torch.Tensor], guidance: float) -> list[dict[str, Any]]:
    values = {name: column.tolist() for name, column in scores.items()}
    return [
        {"prompt_id": prompt.id, "prompt": prompt.prompt, "index": index}
        | {name: column[i] for name, column in values.items()}
        | {"guidance": guidance}
        for i, (prompt, index) in enumerate(places)
    ]


def _drift(round: Round, features: np.ndarray, scratch: Path) -> dict[str, float]:
    """Return FID and KID against base's images of the same prompts and noise; base's features are saved for that."""
    if round.key == BASE:
        save_with_checksum({"features": torch.from_numpy(features)}, scratch / "features.safetensors")
        return {"drift": 0.0, "drift_kid": 0.0}
    path = round.base_files.evaluation / "features.safetensors"
    try:
        base = load_with_checksum(path)["features"].numpy()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); run `srpo evaluate base`, or `dvc checkout`") from None
    if base.shape != features.shape:
        raise UserError(f"{path}: {base.shape} features, but this round has {features.shape}; run `srpo evaluate base`")
    return {"drift": frechet_distance(gaussian(features), gaussian(base)), "drift_kid": paired_kid(features, base)}


def _judge(round: Round, sweep: Mapping[str, Mapping[str, float]], scores: pl.DataFrame) -> dict[str, Any]:
    """Return gate.json. Win rates: `best` over base, each at its best guidance; `base`, `parent` at the reported."""
    base_sweep = read_sweep(round.base_files)
    reported = round.params.evaluate.guidance_scale
    columns = ["prompt_id", "index", "guidance", *round.params.rewards]
    base, parent = (
        parquet.table(files.evaluation / "per_prompt.parquet", columns)
        for files in (round.base_files, round.parent_files)
    )
    best: dict[str, Estimate] = {}
    rates: dict[str, Any] = {}
    for name in round.params.rewards:
        guidance = float(best_guidance(sweep, name))
        base_guidance = float(best_guidance(base_sweep, name))
        best[name] = _win_rate(scores, base, name, guidance, base_guidance)
        rates[name] = {
            "best": best[name]._asdict() | {"guidance": guidance, "base_guidance": base_guidance},
            "base": _win_rate(scores, base, name, reported, reported)._asdict(),
            "parent": _win_rate(scores, parent, name, reported, reported)._asdict(),
        }
    judges, selects = ({name: best[name] for name in round.params.reward_names(role)} for role in ("judge", "select"))
    return judge_round(round.params.gate, sweep, base_sweep, judges, selects) | {
        "best_fid": {
            "guidance": float(best_guidance(sweep, "fid")),
            "base_guidance": float(best_guidance(base_sweep, "fid")),
        },
        "win_rate": rates,
        "image_stats": image_stat_shifts(sweep, base_sweep),
    }


def _headline(
    params: Params, reported: Mapping[str, float], drift: Mapping[str, float], gate: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return metrics.json: few and flat numbers, so that the table of `dvc metrics show` is readable."""
    names = ["images", *params.rewards, "fid", "kid", "cmmd", "diversity"]
    metrics = {"guidance": params.evaluate.guidance_scale} | {name: reported[name] for name in names} | drift
    if gate is None:
        return metrics | {"verdict": "-", "finding": "-"}
    for judge in params.reward_names("judge"):
        rate = gate["win_rate"][judge]["best"]
        metrics |= {f"{judge}_win_rate": rate["value"], f"{judge}_win_rate_low": rate["low"]}
    return metrics | {"verdict": gate["verdict"], "finding": gate["finding"] or "-"}


def _win_rate(scores: pl.DataFrame, other: pl.DataFrame, name: str, guidance: float, other_guidance: float) -> Estimate:
    one = _at(scores, guidance)
    two = _at(other, other_guidance)
    columns = (table[name].cast(pl.Float32).to_numpy() for table in (one, two))
    return win_rate(*columns, one["prompt_id"].to_list())


def _at(scores: pl.DataFrame, guidance: float) -> pl.DataFrame:
    return scores.filter((pl.col("guidance") - guidance).abs() < 1e-4).sort("prompt_id", "index")


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
