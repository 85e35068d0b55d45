"""Stage `train`: fine-tuning on the winners' latents. No VAE and no text encoder inside the loop."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from tqdm import tqdm

from srpo import datasets
from srpo.adapters import Trainee, make_trainee
from srpo.device import pick_dtype
from srpo.errors import UserError
from srpo.hashing import derive_seed
from srpo.lineage import write_lineage
from srpo.objectives import Objective, make_objective, snr_weight, target_of
from srpo.params import Params
from srpo.rounds import RoundFiles
from srpo.sampler import PromptEmbeds, Sampler
from srpo.scratch import scratch_folder
from srpo.sections import TrainParams
from srpo.winners import Winners, batches, load_winners

log = logging.getLogger("srpo")
OnStep = Callable[[Mapping[str, float], int], None]
FIELDS = ["step", "loss", "learning_rate", "grad_norm"]
PROMPTS_AT_ONCE = 256


def train(params: Params, root: Path, key: str, on_step: OnStep = lambda metrics, step: None) -> None:
    """Write `rounds/<key>/adapter/` and `rounds/<key>/training.csv`.

    Args:
        on_step: called after each optimizer step with loss, learning_rate and grad_norm, and the step from 1.

    Raises:
        UserError: no winners, a parent adapter that does not fit, or a loss that is not a number.
    """
    settings, files = params.for_round(key).train, RoundFiles(root, key)
    objective = make_objective(settings)
    winners = load_winners(params, root, key, pairs=objective.pairs)
    fit = _prepare(params, root, key, winners, objective)
    history = list(fit.run(on_step))
    scratch = scratch_folder(root, "train", key, "redone from the start")
    fit.trainee.save(scratch)
    write_lineage(scratch, params, root, key, winners.digests)
    curve = scratch.with_name(f"{scratch.name}.csv")
    with curve.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS)
        writer.writeheader()
        writer.writerows(history)
    datasets.publish(curve, files.training)
    datasets.publish(scratch, files.adapter)
    last = [row["loss"] for row in history[-20:]]
    count = len(winners.latents)
    log.info("train %s: %d steps on %d winners, loss %.4f", key, len(history), count, sum(last) / len(last))


def _prepare(params: Params, root: Path, key: str, winners: Winners, objective: Objective) -> _Fit:
    settings, sampling = params.for_round(key).train, params
    if settings.method == "full":  # float32 weights, and what is computed in is chosen pass by pass
        sampling = params.model_copy(update={"runtime": params.runtime.model_copy(update={"dtype": "float32"})})
    sampler = Sampler(sampling)
    dtype = pick_dtype(params.runtime, sampler.device)
    embeds, rows = _encode(sampler, winners.prompts)
    trainee = make_trainee(sampler.unet, params, root, key, keep=objective.pairs, dtype=dtype)
    return _Fit(
        trainee=trainee,
        objective=objective,
        winners=winners,
        embeds=embeds,
        rows=rows,
        time_ids=sampler.time_ids(*winners.latents.shape[-2:]),
        schedule=DDPMScheduler.from_config(sampler.pipeline.scheduler.config),
        settings=settings,
        seed=(params.seed, key),
        device=sampler.device,
        dtype=dtype,
    )


def _encode(sampler: Sampler, prompts: list[str]) -> tuple[PromptEmbeds, torch.Tensor]:
    """Conditioning of the distinct prompts and, as the last row, of the empty one; and which row each prompt has."""
    distinct = sorted(set(prompts))
    parts = [sampler.encode(distinct[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(distinct), PROMPTS_AT_ONCE)]
    embeds = PromptEmbeds(
        torch.cat([part.tokens[:-1] for part in parts] + [parts[0].tokens[-1:]]),
        torch.cat([part.pooled[:-1] for part in parts] + [parts[0].pooled[-1:]]),
    )
    position = {prompt: i for i, prompt in enumerate(distinct)}
    return embeds, torch.tensor([position[prompt] for prompt in prompts])


@dataclass(frozen=True)
class _Batch:
    """Samples of one step, on the CPU."""

    winners: torch.Tensor
    losers: torch.Tensor | None
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, part: slice) -> _Batch:
        return _Batch(*(None if value is None else value[part] for value in vars(self).values()))


@dataclass(frozen=True)
class _Fit:
    """The loop, and all that it needs."""

    trainee: Trainee
    objective: Objective
    winners: Winners
    embeds: PromptEmbeds
    rows: torch.Tensor
    time_ids: torch.Tensor
    schedule: DDPMScheduler
    settings: TrainParams
    seed: tuple[int, str]
    device: torch.device
    dtype: torch.dtype

    def run(self, on_step: OnStep) -> Iterator[dict[str, float]]:
        """Train, and yield one row of training.csv per step."""
        settings, trained = self.settings, list(self.trainee.parameters.values())
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.trainee.unet.train()
        picks = batches(self.winners, settings, self.seed)
        for step in tqdm(range(1, settings.steps + 1), desc=f"train {self.seed[1]}", unit="step", mininterval=2):
            loss = self._loss(self._draw(step, next(picks)))
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
            on_step(metrics, step)
            yield {"step": step} | metrics

    def _draw(self, step: int, picks: torch.Tensor) -> _Batch:
        # all randomness of a step comes from its number, so a step does not depend on how it was reached
        generator = torch.Generator().manual_seed(derive_seed(*self.seed, "step", step))
        winners = self.winners.latents[picks].float()
        noise = torch.randn(winners.shape, generator=generator)
        timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (len(picks),), generator=generator)
        dropped = torch.rand(len(picks), generator=generator) < self.settings.caption_dropout
        empty = len(self.embeds.tokens) - 1
        return _Batch(
            winners=winners,
            losers=None if self.winners.losers is None else self.winners.losers[picks].float(),
            noise=noise,
            timesteps=timesteps,
            text=torch.where(dropped, empty, self.rows[picks]),
            weights=self.winners.weights[picks],
        )

    def _loss(self, batch: _Batch) -> torch.Tensor:
        """The sum of the batch's losses over the size of the whole step's batch."""
        clean, noise, timesteps, text = batch.winners, batch.noise, batch.timesteps, batch.text
        if batch.losers is not None:  # the same noise and timestep for both
            clean = torch.cat([clean, batch.losers])
            noise, timesteps, text = (torch.cat([value, value]) for value in (noise, timesteps, text))
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        reference = None
        if self.objective.pairs:
            with torch.no_grad(), self.trainee.frozen() as unet:
                reference = self._predict(unet, noisy, timesteps, text)
        predicted = self._predict(self.trainee.unet, noisy, timesteps, text)
        target = target_of(self.schedule, clean, noise, timesteps).to(self.device)
        snr = snr_weight(self.schedule, batch.timesteps, self.settings.snr_gamma).to(self.device)
        losses = self.objective.loss(predicted, reference, target, snr) * batch.weights.to(self.device)
        return losses.sum() / self.settings.batch_size

    def _predict(self, unet, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        given = self.embeds[text.tolist()]
        mixed = self.settings.method == "full" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            return unet(
                noisy.to(self.device, self.dtype),
                timesteps.to(self.device),
                given.tokens,
                added_cond_kwargs={
                    "text_embeds": given.pooled,
                    "time_ids": self.time_ids.expand(len(noisy), -1),
                },
                return_dict=False,
            )[0].float()


def _learning_rate(settings: TrainParams, step: int) -> float:
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))
