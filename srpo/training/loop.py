"""The training loop: the same steps in one process and in several.

All randomness of a step comes from its number and is drawn for the whole batch, which is then split over processes and
passes. So a step depends neither on the steps that this process has run nor on the hardware, except for the order of
sums.
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
from srpo.models.adapters import TrainableUNet
from srpo.sampling.conditioning import PromptEmbeds
from srpo.storage.hashing import derive_seed
from srpo.training.checkpoint import Row, TrainingState
from srpo.training.dataset import Winners, batch_indices
from srpo.training.divergence import DivergenceMonitor
from srpo.training.losses import Loss, prediction_target, snr_weight

log = logging.getLogger(__name__)

OnStep = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class _Batch:
    """Samples of one step, on the CPU.

    Attributes:
        winners: float32 [n, channels, h, w], as are `losers` and `noise`.
        timesteps: int64 [n].
        text: int64 [n], rows of the prompt embeddings.
        weights: float32 [n].
    """

    winners: torch.Tensor
    losers: torch.Tensor | None
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, part: slice) -> _Batch:
        return _Batch(
            winners=self.winners[part],
            losers=None if self.losers is None else self.losers[part],
            noise=self.noise[part],
            timesteps=self.timesteps[part],
            text=self.text[part],
            weights=self.weights[part],
        )


@dataclass(frozen=True)
class TrainingLoop:
    """The loop and its inputs.

    Attributes:
        embeds: conditioning of the distinct prompts, and of the empty prompt in the last row.
        prompt_indices: int64 [n], the row of `embeds` of each winner.
        time_ids: SDXL's size conditioning [1, 6].
        dtype: compute dtype.
    """

    accelerator: Accelerator
    model: TrainableUNet
    loss: Loss
    winners: Winners
    embeds: PromptEmbeds
    prompt_indices: torch.Tensor
    time_ids: torch.Tensor
    schedule: DDPMScheduler
    settings: TrainParams
    runtime: RuntimeParams
    seed: tuple[int, str]
    device: torch.device
    dtype: torch.dtype

    def run(self, folder: Path, on_step: OnStep) -> list[Row]:
        """Train to the end, from the newest state in `folder` if there is one; return the rows of training.csv.

        Leaves the model with the weights to publish.

        Args:
            folder: for the states, and after a failure for `last-good`, an adapter of the last good state.
            on_step: called for every step; after a resume for those before it, too.

        Raises:
            UserError: the loss diverged.
        """
        settings = self.settings
        is_main = self.accelerator.is_main_process
        trained = list(self.model.parameters.values())
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        ema = EMAModel(trained, decay=settings.ema_decay) if settings.ema_decay else None
        state = TrainingState(self.model.parameters, optimizer, ema)
        monitor = DivergenceMonitor(settings.max_loss_ratio, settings.batch_size)
        batches = batch_indices(self.winners, settings, self.seed)

        # resume
        history = state.load(folder)
        resumed = len(history)
        if resumed and is_main:
            log.info("train %s: resuming after step %d", self.seed[1], resumed)
        for row in history:
            next(batches)
            monitor.check(row["loss"], row["grad_norm"])
            if is_main:
                on_step({name: value for name, value in row.items() if name != "step"}, int(row["step"]))

        unet = self._prepare_unet()
        for step in self._progress(resumed):
            # step
            loss = self._backward(unet, self._sample_batch(step, next(batches)))
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item()
            if problem := monitor.check(loss, norm):
                raise UserError(f"{problem} at step {step}; lower it. {self._save_last_good(state, folder)}")

            # checkpoint: the state before this step's update, whose loss is known to be sound only now
            due = step - 1 > resumed and (step - 1) % self.runtime.checkpoint_every == 0
            if due and is_main and not monitor.is_rising:
                state.save(folder, history)

            rate = _learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.step(trained)

            # log
            metrics = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            history.append({"step": step} | metrics)
            if is_main:
                on_step(metrics, step)
        if ema:
            ema.copy_to(trained)
        return history

    def _prepare_unet(self) -> torch.nn.Module:
        self.model.unet.train()
        if self.runtime.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        return self.accelerator.prepare_model(self.model.unet)

    def _progress(self, resumed: int) -> tqdm[int]:
        total = self.settings.steps
        return tqdm(
            range(resumed + 1, total + 1),
            desc=f"train {self.seed[1]}",
            initial=resumed,
            total=total,
            unit="step",
            mininterval=2,
            disable=not self.accelerator.is_main_process,
        )

    def _sample_batch(self, step: int, indices: torch.Tensor) -> _Batch:
        """Draw noise, timesteps and dropped captions for these winners, from the step's number alone."""
        generator = torch.Generator().manual_seed(derive_seed(*self.seed, "step", step))
        winners = self.winners.latents[indices].float()
        noise = torch.randn(winners.shape, generator=generator)
        timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (len(indices),), generator=generator)
        dropped = torch.rand(len(indices), generator=generator) < self.settings.caption_dropout
        empty = len(self.embeds.tokens) - 1
        return _Batch(
            winners=winners,
            losers=None if self.winners.losers is None else self.winners.losers[indices].float(),
            noise=noise,
            timesteps=timesteps,
            text=torch.where(dropped, empty, self.prompt_indices[indices]),
            weights=self.winners.weights[indices],
        )

    def _backward(self, unet: torch.nn.Module, batch: _Batch) -> float:
        """Add up gradients of the batch's mean loss over this process' share of it; return the mean loss."""
        total = self.settings.batch_size
        rank = self.accelerator.process_index
        count = self.accelerator.num_processes
        start = rank * total // count
        stop = (rank + 1) * total // count
        size = self.runtime.train_batch_size or total
        mean = torch.zeros((), device=self.device)
        for first in range(start, stop, size):
            is_last = first + size >= stop
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(unet):
                loss = self._loss(unet, batch[first : min(first + size, stop)]) / total
                (loss * count).backward()  # gradients are averaged over processes
            mean += loss.detach()
        return self.accelerator.reduce(mean, "sum").item()

    def _loss(self, unet: torch.nn.Module, batch: _Batch) -> torch.Tensor:
        """Return the sum of the weighted losses of a batch."""
        clean = batch.winners
        noise = batch.noise
        timesteps = batch.timesteps
        text = batch.text
        if batch.losers is not None:  # the same noise and timestep for both
            clean = torch.cat([clean, batch.losers])
            noise, timesteps, text = (torch.cat([value, value]) for value in (noise, timesteps, text))
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        reference = None
        if self.loss.pairs:
            with torch.no_grad(), self.model.reference() as reference_unet:
                reference = self._predict(reference_unet, noisy, timesteps, text)
        predicted = self._predict(unet, noisy, timesteps, text)
        target = prediction_target(self.schedule, clean, noise, timesteps).to(self.device)
        snr = snr_weight(self.schedule, batch.timesteps, self.settings.snr_gamma).to(self.device)
        return (self.loss.function(predicted, reference, target, snr) * batch.weights.to(self.device)).sum()

    def _predict(
        self, unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        embeds = self.embeds[text.tolist()]
        conditions = {"text_embeds": embeds.pooled, "time_ids": self.time_ids.expand(len(noisy), -1)}
        mixed = self.settings.method == "full" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            x = noisy.to(self.device, self.dtype)
            predicted = unet(
                x, timesteps.to(self.device), embeds.tokens, added_cond_kwargs=conditions, return_dict=False
            )
        return predicted[0].float()

    def _save_last_good(self, state: TrainingState, folder: Path) -> str:
        """Write the last good state as an adapter; return a sentence that says where."""
        history = state.load(folder)
        if not history:
            return "No checkpoint was saved before (runtime.checkpoint_every): the last good state is the initial one"
        adapter = folder / "last-good"
        if self.accelerator.is_main_process:
            if state.ema:
                state.ema.copy_to(state.parameters.values())
            self.model.save(adapter)
        return f"The last good state, after step {len(history)}, is the adapter {adapter}"


def _learning_rate(settings: TrainParams, step: int) -> float:
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))
