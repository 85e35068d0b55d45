"""A round without this project: one script on diffusers and transformers.

    python -m bench.naive_round FOLDER

Candidates are sampled prompt by prompt into PNG files, and CLIP scores are computed image by image. A LoRA loop trains
on the best candidates, with VAE and text encoders in memory. Base and the round are evaluated on the same number of
images with the same metrics. Lineage, resume, report, intervals and tracking are missing. Settings are those of
params.yaml. Prints seconds by part as a line of JSON; bench.round runs it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from cleanfid.fid import frechet_distance
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from demo.captions import parse
from demo.truth import matched, read_image
from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.data.prompts import Prompt, load_prompts

Scorer = tuple[CLIPModel, CLIPProcessor]


def sample(pipeline: StableDiffusionXLPipeline, prompts: list[Prompt], folder: Path, count: int, **settings) -> None:
    """Write `count` PNG files per prompt."""
    folder.mkdir(parents=True)
    for prompt in prompts:
        images = pipeline(
            prompt.prompt, num_images_per_prompt=count, generator=torch.Generator().manual_seed(0), **settings
        ).images
        for index, image in enumerate(images):
            image.save(folder / f"{prompt.id}-{index}.png")


@torch.no_grad()
def clip(scorer: Scorer, image: Image.Image, prompt: str | None = None) -> tuple[float, np.ndarray]:
    """Return CLIP score (meaningless without a prompt) and image features of one image."""
    model, processor = scorer
    found = model(**processor(text=[prompt or ""], images=[image], return_tensors="pt", padding=True, truncation=True))
    return 100 * (found.image_embeds @ found.text_embeds.T).item(), found.image_embeds[0].numpy()


def score(scorers: dict[str, Scorer], prompts: list[Prompt], folder: Path) -> list[dict]:
    """Return each image's scores and features, in the order of prompts and indices."""
    rows = []
    for prompt in prompts:
        for path in sorted(folder.glob(f"{prompt.id}-*.png")):
            image = Image.open(path).convert("RGB")
            values = {name: clip(scorer, image, prompt.prompt) for name, scorer in scorers.items()}
            right = matched(parse(prompt.prompt), read_image(np.asarray(image))) is not None
            rows.append({"prompt": prompt, "path": path, "accuracy": right} | values)
    return rows


def fine_tune(pipeline: StableDiffusionXLPipeline, winners: list[dict], params: Params) -> None:
    """Train a LoRA on the winners' PNG files, as diffusers' example script does."""
    settings, unet = params.train, pipeline.unet
    size = params.generate.height
    unet.requires_grad_(False)
    targets = list(settings.target_modules)
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rate = get_scheduler(
        settings.lr_schedule, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps
    )
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    # with replacement: there may be fewer winners than a batch has samples
    picks = torch.utils.data.RandomSampler(
        winners, replacement=True, num_samples=settings.steps * settings.batch_size, generator=generator
    )
    loader = torch.utils.data.DataLoader(winners, settings.batch_size, sampler=picks, collate_fn=list)
    unet.train()
    for batch in loader:
        with torch.no_grad():
            images = [np.asarray(Image.open(row["path"]).convert("RGB")) for row in batch]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            texts = ["" if np.random.rand() < settings.caption_dropout else row["prompt"].prompt for row in batch]
            tokens, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(batch),))
        ids = torch.tensor([[size, size, 0, 0, size, size]] * len(batch), dtype=torch.float32)
        conditions = {"text_embeds": pooled, "time_ids": ids}
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, tokens, added_cond_kwargs=conditions).sample
        loss = torch.nn.functional.mse_loss(predicted, schedule.get_velocity(latents, noise, timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    unet.eval()


def evaluate(pipeline, scorers, moments, prompts: list[Prompt], folder: Path, params: Params) -> None:
    """Sample and score images at every guidance scale, and compute FID with the judge's features."""
    settings = params.evaluate
    size = {"height": settings.height, "width": settings.width, "num_inference_steps": settings.num_inference_steps}
    for guidance in settings.guidance_scales:
        images = folder / str(guidance)
        sample(pipeline, prompts, images, settings.images_per_prompt, guidance_scale=guidance, **size)
        rows = score(scorers, prompts, images)
        features = np.stack([row["judge"][1] for row in rows])
        fid = frechet_distance(features.mean(0), np.cov(features, rowvar=False), *moments)
        accuracy = np.mean([row["accuracy"] for row in rows])
        reward = np.mean([row["reward"][0] for row in rows])
        print(
            f"{folder.name} at {guidance}: reward {reward:.2f} accuracy {accuracy:.3f} fid {fid:.3f}", file=sys.stderr
        )


def main() -> None:
    """Run a round with the settings and data of the current project; images go under FOLDER."""
    start, folder, seconds = time.perf_counter(), Path(sys.argv[1]), {}

    def finished(part: str) -> None:
        nonlocal start
        seconds[part] = time.perf_counter() - start
        start = time.perf_counter()

    params = load_params()
    settings = params.generate
    pipeline = StableDiffusionXLPipeline.from_pretrained(params.model.base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scorers = {
        name: (CLIPModel.from_pretrained(spec.model).eval(), CLIPProcessor.from_pretrained(spec.model))
        for name, spec in params.rewards.items()
        if spec.kind == "clip"
    }
    # as many as a round of the project draws
    prompts = load_prompts(Path(params.prompts.train))[: settings.prompts_per_round]
    held_out = load_prompts(Path(params.prompts.eval))
    finished("load")
    reference = np.stack(
        [
            clip(scorers["judge"], decode_image(row["image"]))[1]
            for row in parquet.read_rows(Path(params.evaluate.reference), ["image"])
        ]
    )
    moments = [reference.mean(0), np.cov(reference, rowvar=False)]
    evaluate(pipeline, scorers, moments, held_out, folder / "base", params)
    finished("evaluate base")
    size = {"height": settings.height, "width": settings.width, "num_inference_steps": settings.num_inference_steps}
    count, guidance = settings.candidates_per_prompt, settings.guidance_scale
    sample(pipeline, prompts, folder / "candidates", count, guidance_scale=guidance, **size)
    finished("generate")
    rows = score(scorers, prompts, folder / "candidates")
    best: dict[str, dict] = {}
    for row in rows:
        if row["reward"][0] > best.get(row["prompt"].id, {"reward": (-1e9,)})["reward"][0]:
            best[row["prompt"].id] = row
    finished("score, select")
    fine_tune(pipeline, list(best.values()), params)
    pipeline.save_lora_weights(folder / "adapter", unet_lora_layers=_lora(pipeline))
    finished("train")
    evaluate(pipeline, scorers, moments, held_out, folder / "round", params)
    finished("evaluate")
    print(json.dumps(seconds))


def _lora(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    return convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))


if __name__ == "__main__":
    main()
