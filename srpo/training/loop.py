"""The training loop: what one step draws, predicts and learns, alike in one process and in several.

All randomness of a step comes from its number and is drawn for the whole batch, which is then split over processes and
passes. So a step depends neither on how it was reached nor on the hardware, but for the order of sums.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from srpo.config.schema import RuntimeParams, TrainParams
from srpo.errors import UserError
from srpo.models.adapters import Trainee
from srpo.sampling.conditioning import PromptEmbeds
from srpo.storage.hashing import derive_seed
from srpo.training.checkpoint import Row, TrainingState
from srpo.training.dataset import Winners, batches
from srpo.training.divergence import LossWatch
from srpo.training.losses import Objective, snr_weight, target_of

log = logging.getLogger("srpo")
OnStep = Callable[[Mapping[str, float], int], None]


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
class TrainingLoop:
    """The loop, and all that it needs.

    Attributes:
        embeds: conditioning of the distinct prompts, the empty one's last; `rows` has the row of each winner.
        time_ids: SDXL's size conditioning [1, 6].
        dtype: what is computed in.
    """

    accelerator: Accelerator
    trainee: Trainee
    objective: Objective
    winners: Winners
    embeds: PromptEmbeds
    rows: torch.Tensor
    time_ids: torch.Tensor
    schedule: DDPMScheduler
    settings: TrainParams
    runtime: RuntimeParams
    seed: tuple[int, str]
    device: torch.device
    dtype: torch.dtype

    def run(self, folder: Path, on_step: OnStep) -> list[Row]:
        """Train to the end, from the last state in `folder` where there is one; the rows of training.csv.

        Leaves the trainee with the weights to publish.

        Args:
            folder: states are kept there, and after a failure `last-good`, an adapter of the last state.
            on_step: called for every step, those before the last state first.

        Raises:
            UserError: the loss went astray.
        """
        settings, main = self.settings, self.accelerator.is_main_process
        trained = list(self.trainee.parameters.values())
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        ema = EMAModel(trained, decay=settings.ema_decay) if settings.ema_decay else None
        state = TrainingState(self.trainee.parameters, optimizer, ema)
        history, watch = state.load(folder), LossWatch(settings.max_loss_ratio, settings.batch_size)
        picks, done = batches(self.winners, settings, self.seed), len(history)
        if done and main:
            log.info("train %s: going on after step %d", self.seed[1], done)
        for row in history:
            next(picks)
            watch.problem(row["loss"], row["grad_norm"])
            if main:
                on_step({name: row[name] for name in row if name != "step"}, int(row["step"]))
        self.trainee.unet.train()
        if self.runtime.gradient_checkpointing:
            self.trainee.unet.enable_gradient_checkpointing()
        model = self.accelerator.prepare_model(self.trainee.unet)
        steps = range(done + 1, settings.steps + 1)
        bar = {"initial": done, "total": settings.steps, "unit": "step", "mininterval": 2, "disable": not main}
        for step in tqdm(steps, desc=f"train {self.seed[1]}", **bar):
            loss = self._backward(model, self._draw(step, next(picks)))
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item()
            if problem := watch.problem(loss, norm):
                raise UserError(f"{problem} at step {step}; lower it. {self._keep_good(state, folder)}")
            # the state before this step's update: that its loss is sound is known now
            if step - 1 > done and (step - 1) % self.runtime.checkpoint_every == 0 and main and not watch.rising:
                state.save(folder, history)
            rate = _learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.step(trained)
            metrics = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            history.append({"step": step} | metrics)
            if main:
                on_step(metrics, step)
        if ema:
            ema.copy_to(trained)
        return history

    def _draw(self, step: int, picks: torch.Tensor) -> _Batch:
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

    def _backward(self, model: torch.nn.Module, batch: _Batch) -> float:
        """Gradients of the batch's mean loss, from this process' share of it in passes; the loss of all of it."""
        total, rank, count = self.settings.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        start, stop = rank * total // count, (rank + 1) * total // count
        size, found = self.runtime.train_batch_size or total, torch.zeros((), device=self.device)
        for first in range(start, stop, size):
            last = first + size >= stop
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self._loss(model, batch[first : min(first + size, stop)]) / total
                (loss * count).backward()  # gradients are averaged over processes
            found += loss.detach()
        return self.accelerator.reduce(found, "sum").item()

    def _loss(self, model: torch.nn.Module, batch: _Batch) -> torch.Tensor:
        clean, noise, timesteps, text = batch.winners, batch.noise, batch.timesteps, batch.text
        if batch.losers is not None:  # the same noise and timestep for both
            clean = torch.cat([clean, batch.losers])
            noise, timesteps, text = (torch.cat([value, value]) for value in (noise, timesteps, text))
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        reference = None
        if self.objective.pairs:
            with torch.no_grad(), self.trainee.frozen() as unet:
                reference = self._predict(unet, noisy, timesteps, text)
        predicted = self._predict(model, noisy, timesteps, text)
        target = target_of(self.schedule, clean, noise, timesteps).to(self.device)
        snr = snr_weight(self.schedule, batch.timesteps, self.settings.snr_gamma).to(self.device)
        return (self.objective.loss(predicted, reference, target, snr) * batch.weights.to(self.device)).sum()

    def _predict(
        self, unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        given = self.embeds[text.tolist()]
        conditions = {"text_embeds": given.pooled, "time_ids": self.time_ids.expand(len(noisy), -1)}
        mixed = self.settings.method == "full" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            x = noisy.to(self.device, self.dtype)
            predicted = unet(
                x, timesteps.to(self.device), given.tokens, added_cond_kwargs=conditions, return_dict=False
            )
        return predicted[0].float()

    def _keep_good(self, state: TrainingState, folder: Path) -> str:
        """Write the last good state as an adapter; where it is."""
        history = state.load(folder)
        if not history:
            return "No state had been kept before (runtime.checkpoint_every): the last good one is what it started from"
        good = folder / "last-good"
        if self.accelerator.is_main_process:
            if state.ema:
                state.ema.copy_to(state.parameters.values())
            self.trainee.save(good)
        return f"The last good state, after step {len(history)}, is the adapter {good}"


def _learning_rate(settings: TrainParams, step: int) -> float:
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))
