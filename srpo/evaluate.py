"""Stage `evaluate`: the same prompts, seeds and guidance sweep for base and for every round."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from tqdm import tqdm

from srpo import datasets
from srpo.base import write_json
from srpo.gate import check_gate
from srpo.hashing import derive_seed
from srpo.lineage import read_metrics
from srpo.metrics.compare import diversity, win_rate
from srpo.metrics.fid import frechet_distance, kernel_distance
from srpo.params import Params
from srpo.prompts import Prompt, check_disjoint, load_prompts
from srpo.rewards import Reward
from srpo.rounds import BASE, RoundFiles
from srpo.sampler import PromptEmbeds, Sampler, sample_images
from srpo.score import BATCH, batched, load_rewards, to_tensor
from srpo.scratch import scratch_folder

log = logging.getLogger("srpo")


def evaluate(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/evaluation/`: metrics.json, guidance.csv, per_prompt.parquet, samples.parquet.

    Raises:
        UserError: bad prompt files, or a model, reward or reference that can't be read.
    """
    files, settings = RoundFiles(root, key), params.evaluate
    prompts = load_prompts(root / params.prompts.eval)
    check_disjoint(load_prompts(root / params.prompts.train), prompts)
    rewards = load_rewards(params, root)
    reference = _reference_features(root / settings.reference, rewards[settings.features])
    sampler = Sampler(params, files.adapter)
    embeds = sampler.encode([prompt.prompt for prompt in prompts])
    scratch = scratch_folder(root, "evaluate", key, "redone from the start")
    rows, sweep, reported = [], {}, {}
    total = len(prompts) * settings.images_per_prompt * len(settings.guidance_scales)
    with tqdm(total=total, unit="img", desc=f"evaluate {key}", mininterval=2) as progress:
        for guidance in settings.guidance_scales:
            images, plan = _sample(sampler, embeds, prompts, guidance, params, progress)
            scores = _score(rewards, images, [prompt.prompt for prompt, _ in plan])
            features = _features(rewards[settings.features], images)
            for i, (prompt, index) in enumerate(plan):
                row = {"prompt_id": prompt.id, "prompt": prompt.prompt, "index": index, "guidance": guidance}
                rows.append(row | {name: float(values[i]) for name, values in scores.items()})
            sweep[str(guidance)] = {name: float(values.mean()) for name, values in scores.items()} | {
                "fid": frechet_distance(features, reference),
                "kid": kernel_distance(features, reference),
                "diversity": diversity(features, [prompt.id for prompt, _ in plan]),
            }
            if guidance == settings.guidance_scale:
                reported = {"images": len(images)} | sweep[str(guidance)]
                _write_samples(scratch / "samples.parquet", images, plan, settings.samples)
    _write_scores(scratch / "per_prompt.parquet", rows, list(rewards))
    with (scratch / "guidance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["guidance", *next(iter(sweep.values()))])
        writer.writeheader()
        writer.writerows({"guidance": guidance} | values for guidance, values in sweep.items())
    metrics = {"round": key, "guidance_scale": settings.guidance_scale} | reported | {"sweep": sweep}
    write_json(scratch / "metrics.json", metrics | _verdict(params, root, key, metrics, pl.DataFrame(rows)))
    datasets.publish(scratch, files.evaluation)
    log.info("evaluate %s: %s", key, ", ".join(f"{name} {reported[name]:.3f}" for name in [*rewards, "fid"]))


def _sample(
    sampler: Sampler,
    embeds: PromptEmbeds,
    prompts: list[Prompt],
    guidance: float,
    params: Params,
    progress: tqdm,
) -> tuple[torch.Tensor, list[tuple[Prompt, int]]]:
    settings = params.evaluate
    places = [(row, index) for row in range(len(prompts)) for index in range(settings.images_per_prompt)]
    _, images = sample_images(
        sampler,
        embeds,
        [row for row, _ in places],
        # no round in the seed: all rounds meet the same noise, so that they compare picture by picture
        [derive_seed(params.seed, "evaluate", prompts[row].id, index) for row, index in places],
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=guidance,
        batch_size=params.runtime.batch_size,
        on_images=progress.update,
    )
    return images.permute(0, 3, 1, 2).contiguous(), [(prompts[row], index) for row, index in places]


def _score(rewards: dict[str, Reward], images: torch.Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
    parts = list(zip(images.split(BATCH), batched(prompts, BATCH), strict=True))
    return {
        name: torch.cat([reward.score(batch, texts) for batch, texts in parts]).numpy()
        for name, reward in rewards.items()
    }


def _features(reward: Reward, images: torch.Tensor) -> np.ndarray:
    return torch.cat([reward.features(batch) for batch in images.split(BATCH)]).numpy()


def _reference_features(path: Path, reward: Reward) -> np.ndarray:
    cells = (row["image"] for row in datasets.read_rows(path, ["image"]))
    return np.concatenate([_features(reward, to_tensor(batch)) for batch in batched(cells, BATCH)])


def _write_samples(path: Path, images: torch.Tensor, plan: list[tuple[Prompt, int]], prompts: int) -> None:
    kept = list(dict.fromkeys(prompt.id for prompt, _ in plan))[:prompts]
    rows = [
        {
            "prompt_id": prompt.id,
            "prompt": prompt.prompt,
            "index": index,
            "image": datasets.encode_png(image.permute(1, 2, 0).numpy()),
        }
        for image, (prompt, index) in zip(images, plan, strict=True)
        if prompt.id in kept
    ]
    fields = {"prompt_id": pa.string(), "prompt": pa.string(), "index": pa.int32(), "image": datasets.IMAGE}
    datasets.write_table(path, rows, fields)


def _write_scores(path: Path, rows: list[dict[str, Any]], rewards: list[str]) -> None:
    fields = {"prompt_id": pa.string(), "prompt": pa.string(), "index": pa.int32(), "guidance": pa.float32()}
    datasets.write_table(path, rows, fields | dict.fromkeys(rewards, pa.float32()))


def _verdict(params: Params, root: Path, key: str, metrics: dict, scores: pl.DataFrame) -> dict[str, Any]:
    """Win rates against base and parent, the gate's rules and the verdict; base itself has none."""
    if key == BASE:
        return {"verdict": "-"}
    judges = params.reward_names("judge")
    rates: dict[str, dict[str, float]] = {judge: {} for judge in judges}
    best: dict[str, float] = {}
    for name, rival in {"base": BASE, "parent": params.rounds[key].parent}.items():
        other = pl.read_parquet(RoundFiles(root, rival).evaluation / "per_prompt.parquet")
        rival_metrics = read_metrics(root, rival)
        for judge in judges:
            guidance = params.evaluate.guidance_scale
            rates[judge][name] = _pair(scores, other, judge, guidance, guidance)
            if name == "base":
                best[judge] = _pair(scores, other, judge, _best(metrics, judge), _best(rival_metrics, judge))
    rules = check_gate(params.gate, metrics, read_metrics(root, BASE), best)
    verdict = "pass" if all(rule["passed"] for rule in rules.values()) else "fail"
    return {"win_rate": rates, "gate": rules, "verdict": verdict}


def _best(metrics: dict, judge: str) -> float:
    return float(max(metrics["sweep"], key=lambda guidance: metrics["sweep"][guidance][judge]))


def _pair(scores: pl.DataFrame, other: pl.DataFrame, judge: str, guidance: float, other_guidance: float) -> float:
    def column(table: pl.DataFrame, at: float) -> np.ndarray:
        rows = table.filter((pl.col("guidance") - at).abs() < 1e-4).sort("prompt_id", "index")
        return rows[judge].cast(pl.Float32).to_numpy()

    return win_rate(column(scores, guidance), column(other, other_guidance))
