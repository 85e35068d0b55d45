"""Stage `generate`: N candidates for every train prompt, from the parent round's model."""

from __future__ import annotations

import logging
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from srpo import datasets
from srpo.hashing import derive_seed, digest
from srpo.params import Params
from srpo.prompts import Prompt, check_disjoint, load_prompts
from srpo.rounds import RoundFiles
from srpo.sampler import Sampler, sample_images
from srpo.scratch import scratch_folder
from srpo.sections import GenerateParams

log = logging.getLogger("srpo")


def generate(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/candidates/`, one parquet shard per `prompts_per_shard` prompts.

    A shard that an interrupted run finished is kept.

    Raises:
        UserError: bad prompt files or a base model that can't be loaded.
    """
    settings = params.for_round(key).generate
    files, parent = RoundFiles(root, key), RoundFiles(root, params.rounds[key].parent)
    prompts = load_prompts(root / params.prompts.train)
    check_disjoint(prompts, load_prompts(root / params.prompts.eval))
    inputs = {
        "seed": params.seed,
        "model": params.model.model_dump(),
        "generate": settings.model_dump(),
        "prompts": [vars(prompt) for prompt in prompts],
        "adapter": digest(parent.adapter),
    }
    scratch = scratch_folder(root, "generate", key, inputs)
    size = settings.prompts_per_shard
    parts = [range(len(prompts))[start : start + size] for start in range(0, len(prompts), size)]
    names = [f"shard-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    todo = [(part, name) for part, name in zip(parts, names, strict=True) if not (scratch / name).exists()]
    if todo:
        sampler = Sampler(params, parent.adapter)
        total = sum(len(part) for part, _ in todo) * settings.candidates_per_prompt
        # else the line of a shard is printed into the bar
        with logging_redirect_tqdm(), tqdm(total=total, unit="img", desc=f"generate {key}", mininterval=2) as progress:
            for part, name in todo:
                rows = _candidates(sampler, [prompts[i] for i in part], params, settings, key, progress)
                datasets.write_table(scratch / name, rows, datasets.CANDIDATE_FIELDS)
                log.info("generate %s: wrote %s, %d candidates", key, name, len(rows))
    datasets.publish(scratch, files.candidates)


def _candidates(
    sampler: Sampler,
    prompts: list[Prompt],
    params: Params,
    settings: GenerateParams,
    key: str,
    progress: tqdm,
) -> list[dict]:
    plan = [(row, index) for row in range(len(prompts)) for index in range(settings.candidates_per_prompt)]
    seeds = [derive_seed(params.seed, key, prompts[row].id, index) for row, index in plan]
    latents, images = sample_images(
        sampler,
        sampler.encode([prompt.prompt for prompt in prompts]),
        [row for row, _ in plan],
        seeds,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        on_images=progress.update,
    )
    return [
        {
            "candidate_id": f"{key}-{prompts[row].id}-{index:04d}",
            "prompt_id": prompts[row].id,
            "prompt": prompts[row].prompt,
            "index": index,
            "seed": seed,
            "image": datasets.encode_png(image.numpy()),
            "latents": latent.flatten().numpy(),
            "latents_shape": list(latent.shape),
            "steps": settings.num_inference_steps,
            "guidance": settings.guidance_scale,
        }
        for (row, index), seed, latent, image in zip(plan, seeds, latents, images, strict=True)
    ]
