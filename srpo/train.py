"""Stage `train`: LoRA fine-tuning on the winners' latents. No VAE and no text encoder inside the loop."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm import tqdm

from srpo import datasets
from srpo.errors import UserError
from srpo.hashing import derive_seed
from srpo.lineage import WEIGHTS_FILE, write_lineage
from srpo.params import Params
from srpo.rounds import BASE, RoundFiles
from srpo.sampler import PromptEmbeds, Sampler
from srpo.scratch import scratch_folder
from srpo.sections import TrainParams

log = logging.getLogger("srpo")
OnStep = Callable[[Mapping[str, float], int], None]


def train(params: Params, root: Path, key: str, on_step: OnStep = lambda metrics, step: None) -> None:
    """Write `rounds/<key>/adapter/` and `rounds/<key>/training.csv`.

    The LoRA starts from the parent's and is always relative to the base model.

    Args:
        on_step: called after each optimizer step with loss, learning_rate and grad_norm, and the step from 1.

    Raises:
        UserError: no winners, a parent adapter that does not fit, or a loss that is not a number.
    """
    settings, files = params.for_round(key).train, RoundFiles(root, key)
    sampler = Sampler(params)
    latents, embeds, weights, size = _load_winners(files.winners, sampler)
    unet = _with_lora(sampler.unet, settings, params, root, key)
    history = _fit(unet, sampler, latents, embeds, weights, size, settings, (params.seed, key), on_step)
    scratch = scratch_folder(root, "train", key, "redone from the start")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(
        scratch, unet_lora_layers={name: value.float().cpu().contiguous() for name, value in layers.items()}
    )
    write_lineage(scratch, params, root, key)
    curve = scratch.with_name(f"{scratch.name}.csv")
    with curve.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["step", "loss", "learning_rate", "grad_norm"])
        writer.writeheader()
        writer.writerows(history)
    datasets.publish(curve, files.training)
    datasets.publish(scratch, files.adapter)
    last = [row["loss"] for row in history[-20:]]
    log.info("train %s: %d steps on %d winners, loss %.4f", key, len(history), len(latents), sum(last) / len(last))


def _load_winners(path: Path, sampler: Sampler) -> tuple[torch.Tensor, PromptEmbeds, torch.Tensor, tuple[int, int]]:
    rows = list(datasets.read_rows(path, ["prompt", "latents", "latents_shape", "weight"]))
    if not rows:
        raise UserError(f"{path}: holds no winners; run select")
    prompts = sorted({row["prompt"] for row in rows})
    known = sampler.encode(prompts)
    position = {prompt: i for i, prompt in enumerate(prompts)}
    latents = torch.from_numpy(np.stack([datasets.latents_array(row) for row in rows])).float()
    # the empty prompt's row comes along as the last one
    picks = [position[row["prompt"]] for row in rows] + [len(prompts)]
    weights = torch.tensor([row["weight"] for row in rows])
    return latents, known[picks], weights, tuple(latents.shape[-2:])


def _with_lora(unet: UNet2DConditionModel, settings: TrainParams, params: Params, root: Path, key: str):
    unet.requires_grad_(False)
    torch.manual_seed(params.seed)  # PEFT draws LoRA's A matrices from the global generator
    # alpha = rank keeps the scale at 1, so that the file needs no alpha to be read back right
    unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(settings.target_modules))
    )
    parent = params.rounds[key].parent
    if parent != BASE:
        folder = RoundFiles(root, parent).adapter
        if not (folder / WEIGHTS_FILE).exists():
            raise UserError(f"{folder / WEIGHTS_FILE}: missing; run train of round {parent} or `dvc checkout`")
        state = load_file(folder / WEIGHTS_FILE)
        state = {name.removeprefix("unet."): value for name, value in state.items()}
        try:
            result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), adapter_name="default")
        except RuntimeError:
            result = None
        own = get_peft_model_state_dict(unet)
        if result is None or result.unexpected_keys or len(own) != len(state):
            raise UserError(
                f"rounds.{key}.train: rank or target_modules differ from those of parent {parent}; keep them"
            )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


def _fit(
    unet: UNet2DConditionModel,
    sampler: Sampler,
    latents: torch.Tensor,
    embeds: PromptEmbeds,
    weights: torch.Tensor,
    size: tuple[int, int],
    settings: TrainParams,
    seed: tuple[int, str],
    on_step: OnStep,
) -> list[dict[str, float]]:
    device, dtype = sampler.device, unet.dtype
    schedule = DDPMScheduler.from_config(sampler.pipeline.scheduler.config)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    unet.train()
    history, empty = [], len(latents)
    time_ids = sampler.time_ids(*size).expand(settings.batch_size, -1)
    batches = _batches(len(latents), settings.batch_size, seed)
    for step in tqdm(range(1, settings.steps + 1), desc=f"train {seed[1]}", unit="step", mininterval=2):
        picks = next(batches)
        # all randomness of a step comes from its number, so a step does not depend on how it was reached
        generator = torch.Generator().manual_seed(derive_seed(*seed, "step", step))
        clean = latents[picks]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(picks),), generator=generator)
        dropped = torch.rand(len(picks), generator=generator) < settings.caption_dropout
        text = embeds[torch.where(dropped, empty, picks).tolist()]
        noisy = schedule.add_noise(clean, noise, timesteps).to(device, dtype)
        predicted = unet(
            noisy,
            timesteps.to(device),
            text.tokens,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": time_ids},
            return_dict=False,
        )[0].float()
        target = schedule.get_velocity(clean, noise, timesteps) if _is_velocity(schedule) else noise
        loss = (predicted - target.to(device)).pow(2).mean(dim=(1, 2, 3))
        weight = weights[picks] * _snr_weight(schedule, timesteps, settings.snr_gamma)
        loss = (loss * weight.to(device)).mean()
        if not torch.isfinite(loss):
            raise UserError(f"train.learning_rate: the loss is not a number at step {step}; lower it")
        rate = _learning_rate(settings, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss.item(), "learning_rate": rate, "grad_norm": norm.item()}
        history.append({"step": step} | metrics)
        on_step(metrics, step)
    return history


def _batches(count: int, size: int, seed: tuple[int, str]) -> Iterator[torch.Tensor]:
    """Index batches that run through a fresh permutation of the winners in every epoch, without end."""
    queue, epoch = torch.empty(0, dtype=torch.long), 0
    while True:
        while len(queue) < size:
            generator = torch.Generator().manual_seed(derive_seed(*seed, "epoch", epoch))
            queue, epoch = torch.cat([queue, torch.randperm(count, generator=generator)]), epoch + 1
        yield queue[:size]
        queue = queue[size:]


def _learning_rate(settings: TrainParams, step: int) -> float:
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


def _snr_weight(schedule: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR loss weights (Hang et al., 2023), float32 [n]; ones when gamma is None."""
    if gamma is None:
        return torch.ones(len(timesteps))
    snr = compute_snr(schedule, timesteps)
    return snr.clamp(max=gamma) / (snr + 1 if _is_velocity(schedule) else snr)


def _is_velocity(schedule: DDPMScheduler) -> bool:
    return schedule.config.prediction_type == "v_prediction"
