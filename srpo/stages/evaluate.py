"""Stage `evaluate`: measure base and every round with the same prompts, seeds and guidance sweep.

A unit of work is one batch of images at one guidance scale. Its measured values are written to a file in scratch;
metrics are computed from these files.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from srpo.config.schema import ImageSize
from srpo.data import parquet
from srpo.data.images import encode_images
from srpo.data.prompts import Prompt, check_disjoint, load_prompts, named_texts, negative_prompts
from srpo.data.records import headline, write_sweep
from srpo.data.schemas import PER_PROMPT_FIELDS, SAMPLE_FIELDS, with_rewards
from srpo.errors import UserError
from srpo.evaluation.accumulator import Measurements, MetricAccumulator, measure
from srpo.evaluation.drift import FEATURES_FILE, drift_from_base, read_base_features
from srpo.evaluation.features import load_extractors
from srpo.evaluation.gate import best_of_sweep
from srpo.evaluation.reference import load_reference
from srpo.lineage.code import import_closure_digest
from srpo.lineage.record import check_base, require_weights
from srpo.models.tokenizer import load_tokenizer, text_read, warn_of_cut_prompts
from srpo.rewards.batches import BATCH, batched
from srpo.rewards.loading import load_pinned_rewards, reward_code
from srpo.rewards.validated import ValidatedReward
from srpo.rounds import BASE, Round
from srpo.runtime import distributed
from srpo.runtime.inputs import model_inputs, reward_inputs
from srpo.runtime.make_units import is_shared, make_units
from srpo.runtime.progress import image_progress
from srpo.runtime.units import Make, Units, unfinished
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler, sample_images
from srpo.sampling.sizes import of_size, rows_by_size, untrained_sizes
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed, digest
from srpo.storage.json_files import write_json
from srpo.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
Place = tuple[int, int]
"""The row of a prompt in its file, and the number of an image among the prompt's."""


@dataclass(frozen=True)
class Batch:
    """The images of one unit, all of one size. `sampled` are the indices of those that are kept as samples."""

    guidance: float
    size: ImageSize
    places: list[Place]
    sampled: list[int]


def evaluate(round: Round) -> None:
    """Write `rounds/<key>/evaluation/`.

    guidance.csv: every metric with its interval at every guidance scale (`MetricAccumulator.compute`).
    per_prompt.parquet: every score of every image. samples.parquet: some images.
    drift.json, of rounds: FID and KID against base's own images at the reported guidance.
    features.safetensors and metrics.json, of base: features at the reported guidance, from which the drift of rounds is
    computed; headline numbers, which stage `gate` writes for rounds.

    Units that an interrupted run finished are kept. With `runtime.processes` above 1 this process starts workers that
    share the others, and computes the metrics.

    Raises:
        UserError: bad prompt files, no adapter, or an unreadable model, reward or reference.
    """
    params = round.params
    prompts = _load_prompts(round)
    require_weights(round.files)
    scratch, batches = _plan(round, prompts)
    rewards = None
    references = {}
    base_features = None
    if not distributed.is_worker():
        base_features = None if round.key == BASE else read_base_features(round.base_files)
        rewards = load_pinned_rewards(params, round.root)
        if params.evaluate.diversity_judge:
            rewards[params.evaluate.diversity_judge].require_attributes()
        references = {
            name: load_reference(round.root / params.evaluate.reference, extractor, round.root / ".srpo" / "cache")
            for name, extractor in load_extractors(params, round.root, rewards).items()
        }
    if is_shared(params.runtime):  # those that make the units load their own, and need the memory
        rewards = None
        gc.collect()
        torch.cuda.empty_cache()
    inputs = [
        *model_inputs(round),
        *reward_inputs(round, params.rewards),
        round.files.adapter,
        round.base_files.rewards,
    ]
    left = sum(len(batches[path].places) for path in unfinished(list(batches)))
    by_name = {path.name: batch for path, batch in batches.items()}
    load = partial(_load_models, prompts, by_name, left, rewards)
    make_units(Units(round, "evaluate", list(batches), load, inputs, check=partial(check_base, round.root)))
    if distributed.is_worker():
        return
    out = scratch / "evaluation"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _write(round, prompts, batches, references, base_features, out)
    publish(out, round.files.evaluation)
    shutil.rmtree(scratch)


@contextmanager
def _load_models(
    prompts: Sequence[Prompt],
    batches: Mapping[str, Batch],
    left: int,
    rewards: Mapping[str, ValidatedReward] | None,
    round: Round,
) -> Iterator[Make]:
    """Load the models.

    Args:
        batches: by the names of the units.
        left: images that are still to be made, for the progress bar.
        rewards: None to load them.
    """
    params = round.params
    sampler = Sampler(params, round.files.adapter, fast=True)
    negatives = negative_prompts(prompts, params.evaluate.negative_prompt)
    embeds = prompt_embeds(sampler, [prompt.prompt for prompt in prompts], round.root, negatives)
    sampler.release_text_encoders()
    rewards = load_pinned_rewards(params, round.root) if rewards is None else rewards
    extractors = load_extractors(params, round.root, rewards)
    attributes = {name: judge for name, judge in rewards.items() if name == params.evaluate.diversity_judge}
    texts = [
        [prompts[row].prompt for row, _ in batch.places]
        for batch in batches.values()
        if batch.guidance == params.evaluate.guidance_scales[0]
    ]
    for reward in rewards.values():
        reward.prepare(texts)
    with image_progress(f"evaluate {round.key}", left) as progress:

        def make(unit: Path) -> None:
            batch = batches[unit.name]
            images = _sample(round, sampler, embeds, prompts, batch, progress)
            texts = [prompts[row].prompt for row, _ in batch.places]
            _save(unit, measure(images, texts, rewards, extractors, attributes), images[batch.sampled])

        yield make


def _load_prompts(round: Round) -> list[Prompt]:
    paths = round.params.prompts
    prompts = load_prompts(round.root / paths.eval)
    tokenizer = load_tokenizer(round.params.model, round.root)
    train = load_prompts(round.root / paths.train)
    check_disjoint(train, prompts, text_read(round.params.model, tokenizer))
    if not distributed.is_worker():
        warn_of_cut_prompts("evaluate", named_texts(prompts, round.params.evaluate.negative_prompt), round, tokenizer)
        if problem := untrained_sizes(train, round.params.generate, prompts, round.params.evaluate):
            log.warning("evaluate %s: %s", round.key, problem)
    if (len(prompts) - 1) * round.params.evaluate.images_per_prompt < 2:
        raise UserError(f"{paths.eval}: too few prompts for an interval; at least 3 are needed")
    return prompts


def _plan(round: Round, prompts: Sequence[Prompt]) -> tuple[Path, dict[Path, Batch]]:
    """Return the scratch folder, and all units, finished or not, in the order of guidance scales and prompts."""
    params, settings = round.params, round.params.evaluate
    inputs = {
        "seed": params.seed,
        "model": params.model.model_dump(),
        "prompts": [vars(prompt) for prompt in prompts],
        "evaluate": settings.model_dump(exclude={"reference"}),
        "rewards": {name: [spec.model_dump(), reward_code(spec, round.root)] for name, spec in params.rewards.items()},
        "pinned": digest(round.base_files.rewards) if round.base_files.rewards.exists() else None,
        "adapter": digest(round.files.adapter),
        "code": import_closure_digest("srpo.stages.evaluate"),
        "runtime": [params.runtime.device, params.runtime.dtype],
    }
    scratch = scratch_folder(round.root, "evaluate", round.key, inputs)
    groups = [
        (size, [(row, index) for row in rows for index in range(settings.images_per_prompt)])
        for size, rows in rows_by_size(prompts, settings).items()
    ]
    parts = [(size, batch) for size, places in groups for batch in batched(places, BATCH)]
    units: dict[Path, Batch] = {}
    for guidance in settings.guidance_scales:
        reported = guidance == settings.guidance_scale
        for number, (size, batch) in enumerate(parts):
            sampled = [i for i, (row, _) in enumerate(batch) if reported and row < settings.samples]
            units[scratch / f"guidance-{guidance}-{number:05d}.safetensors"] = Batch(guidance, size, batch, sampled)
    return scratch, units


def _sample(
    round: Round, sampler: Sampler, embeds: Any, prompts: Sequence[Prompt], batch: Batch, progress: tqdm
) -> torch.Tensor:
    """Return the batch's images, uint8 [n, 3, height, width]."""
    settings = round.params.evaluate
    _, images = sample_images(
        sampler,
        embeds,
        [row for row, _ in batch.places],
        # no round in the seed: all rounds get the same noise, so that they are compared image by image
        [derive_seed(round.params.seed, "evaluate", prompts[row].id, index) for row, index in batch.places],
        of_size(settings, batch.size).model_copy(update={"guidance_scale": batch.guidance}),
        progress.update,
    )
    # in the memory order of decoded images, as in the reference: the same pixels give the same features
    return images.permute(0, 3, 1, 2)


def _save(unit: Path, measured: Measurements, samples: torch.Tensor) -> None:
    tensors = {f"{field}.{name}": values for field, part in measured._asdict().items() for name, values in part.items()}
    tensors["samples"] = samples
    save_with_checksum({name: values.contiguous() for name, values in tensors.items()}, unit)


def _load(unit: Path) -> tuple[Measurements, torch.Tensor]:
    tensors = load_with_checksum(unit)
    samples = tensors.pop("samples")
    parts: dict[str, dict[str, torch.Tensor]] = {field: {} for field in Measurements._fields}
    for key, values in tensors.items():
        field, _, name = key.partition(".")
        parts[field][name] = values
    return Measurements(**parts), samples


def _write(
    round: Round,
    prompts: Sequence[Prompt],
    batches: Mapping[Path, Batch],
    references: Mapping[str, Any],
    base_features: np.ndarray | None,
    out: Path,
) -> None:
    """Compute the metrics from the units, and write all files of the evaluation."""
    settings = round.params.evaluate
    rewards = list(round.params.rewards)
    order = {name: number for number, name in enumerate(sorted(prompt.id for prompt in prompts))}
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    sweep: dict[str, dict[str, float]] = {}
    features: list[torch.Tensor] = []
    for guidance in settings.guidance_scales:
        accumulator = MetricAccumulator(rewards, references, settings.features, settings.clip_name)
        for unit, batch in batches.items():
            if batch.guidance != guidance:
                continue
            measured, images = _load(unit)
            accumulator.update(measured, torch.tensor([order[prompts[row].id] for row, _ in batch.places]))
            known = [
                {"prompt_id": prompts[row].id, "prompt": prompts[row].prompt, "index": index}
                for row, index in batch.places
            ]
            scores = {name: values.tolist() for name, values in measured.scores.items()}
            rows += [
                row | {"guidance": guidance} | {name: values[i] for name, values in scores.items()}
                for i, row in enumerate(known)
            ]
            cells = encode_images(image.permute(1, 2, 0).numpy() for image in images)
            samples += [known[i] | {"image": cell} for i, cell in zip(batch.sampled, cells, strict=True)]
            if guidance == settings.guidance_scale:
                features.append(measured.features[settings.features])
        sweep[str(guidance)] = accumulator.compute()
    parquet.write_table(out / "samples.parquet", samples, SAMPLE_FIELDS)
    parquet.write_table(out / "per_prompt.parquet", rows, with_rewards(PER_PROMPT_FIELDS, rewards))
    write_sweep(out / "guidance.csv", sweep)
    if base_features is None:
        save_with_checksum({"features": torch.cat(features)}, out / FEATURES_FILE)
        drift = {"drift": 0.0, "drift_kid": 0.0}
        metrics = headline(sweep, settings.guidance_scale, rewards) | drift | best_of_sweep(sweep, rewards)
        metrics |= {"verdict": "-", "finding": "-"}
        write_json(out / "metrics.json", metrics)
    else:
        write_json(out / "drift.json", drift_from_base(round.base_files, torch.cat(features).numpy(), base_features))
    _report(round, sweep)


def _report(round: Round, sweep: Mapping[str, Mapping[str, float]]) -> None:
    reported = sweep[str(round.params.evaluate.guidance_scale)]
    numbers = ", ".join(f"{name} {reported[name]:.3f}" for name in [*round.params.rewards, "fid"])
    log.info("evaluate %s: %s", round.key, numbers)
    for name in round.params.rewards:
        if missing := sum(int(record.get(f"{name}_missing", 0)) for record in sweep.values()):
            log.warning("evaluate %s: %s is NaN or infinite for %d images; left out", round.key, name, missing)
