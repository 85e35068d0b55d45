"""The training loop: the same steps in one process and in several.

All randomness of a step comes from its number and is drawn for the whole batch, which is then split over processes and
passes. So a step depends neither on the steps that this process has run nor on the hardware, except for the order of
sums.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from srpo.config.schema import RuntimeParams, TrainParams
from srpo.errors import UserError
from srpo.rewards.batches import batched
from srpo.runtime import distributed
from srpo.runtime.progress import OnStep
from srpo.sampling.prompt_cache import StoredEmbeds
from srpo.storage.hashing import derive_seed
from srpo.training.checkpoint import Row, TrainingState
from srpo.training.dataset import Winners, batch_indices
from srpo.training.divergence import DivergenceMonitor
from srpo.training.losses import Loss, pair_metrics
from srpo.training.model import TrainableModel
from srpo.training.noise_schedule import NoiseSchedule, prediction_type_mismatch
from srpo.training.optimizers import make_optimizer
from srpo.training.prompt_tokens import PromptTokens

log = logging.getLogger(__name__)

NUM_PROBES = 16


@dataclass(frozen=True)
class _Batch:
    """Samples of one step, or this process' share of them, on the CPU.

    Attributes:
        winners: n latents, float16 [channels, h, w], of any size; so are `losers`, and `noise` in float32.
        levels: noise levels [n].
        text: int64 [n], rows of the prompt embeddings.
        weights: float32 [n].
        dropout_seeds: of LoRA's dropout, int64 [n].
    """

    winners: list[torch.Tensor]
    losers: list[torch.Tensor] | None
    noise: list[torch.Tensor]
    levels: torch.Tensor
    text: torch.Tensor
    weights: torch.Tensor
    dropout_seeds: torch.Tensor

    def __getitem__(self, part: list[int]) -> _Batch:
        return _Batch(
            winners=[self.winners[i] for i in part],
            losers=None if self.losers is None else [self.losers[i] for i in part],
            noise=[self.noise[i] for i in part],
            levels=self.levels[part],
            text=self.text[part],
            weights=self.weights[part],
            dropout_seeds=self.dropout_seeds[part],
        )


@dataclass(frozen=True)
class TrainingLoop:
    """The loop and its inputs.

    Attributes:
        texts: conditioning of the winners' distinct prompts, and of the empty prompt in the last row; their tokens, if
            the text encoders are trained.
        time_ids: gives SDXL's size conditioning [1, 6] of latents' height and width.
        dtype: compute dtype.
    """

    accelerator: Accelerator
    model: TrainableModel
    loss: Loss
    winners: Winners
    texts: StoredEmbeds | PromptTokens
    time_ids: Callable[[int, int], torch.Tensor]
    schedule: NoiseSchedule
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
            UserError: the training diverged, or the base's scheduler names another prediction type than its UNet has.
        """
        settings = self.settings
        is_main = self.accelerator.is_main_process
        trained = list(self.model.parameters.values())
        optimizer = make_optimizer(settings, trained, self.device)
        ema = EMAModel(trained, decay=settings.ema_decay) if settings.ema_decay else None
        state = TrainingState(self.model.parameters, optimizer, ema)
        monitor = DivergenceMonitor(settings.max_loss_ratio, settings.max_winner_error_ratio, settings.batch_size)
        batches = batch_indices(self.winners, settings, self.seed)

        # resume
        history = state.load(folder)
        resumed = len(history)
        if resumed and is_main:
            log.info("train %s: resuming after step %d", self.seed[1], resumed)
        for row in history:
            next(batches)
            monitor.check(row)
            if is_main:
                on_step({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
        if not resumed:
            self._check_prediction_type()

        denoiser = self._prepare_denoiser()
        for step in self._progress(resumed):
            # step
            loss, errors = self._backward(denoiser, self._sample_batch(step, next(batches)))
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item()
            rate = _learning_rate(settings, step)
            metrics = {"loss": loss, "learning_rate": rate, "grad_norm": norm} | errors
            if problem := monitor.check(metrics):
                raise UserError(f"{problem} at step {step}; lower it. {self._save_last_good(state, folder)}")

            # checkpoint: the state before this step's update, whose loss is known to be sound only now
            due = step - 1 > resumed and (step - 1) % self.runtime.checkpoint_every == 0
            if due and is_main and not monitor.is_rising:
                state.save(folder, history)

            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.step(trained)

            # log
            history.append({"step": step} | metrics)
            if is_main:
                on_step(metrics, step)
        if ema:
            ema.copy_to(trained)
        return history

    def _prepare_denoiser(self) -> torch.nn.Module:
        denoiser = self.model.denoiser.train()
        if self.runtime.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return self.accelerator.prepare_model(denoiser)

    def _progress(self, resumed: int) -> tqdm[int]:
        total = self.settings.steps
        return tqdm(
            range(resumed + 1, total + 1),
            desc=f"train {self.seed[1]}",
            initial=resumed,
            total=total,
            unit="step",
            mininterval=2,
            disable=not (self.accelerator.is_main_process and distributed.draws_progress()),
        )

    def _sample_batch(self, step: int, indices: torch.Tensor) -> _Batch:
        """Draw noise, noise levels and dropped captions for these winners, from the step's number alone.

        Returns:
            This process' share of the batch.
        """
        generator = torch.Generator().manual_seed(derive_seed(*self.seed, "step", step))
        noise = [torch.randn(shape, generator=generator) for shape in self.winners.shapes[indices.numpy()].tolist()]
        levels = self.schedule.draw_levels(len(indices), generator)
        dropped = torch.rand(len(indices), generator=generator) < self.settings.caption_dropout
        text = torch.where(dropped, len(self.texts) - 1, self.winners.prompt_indices[indices])
        seeds = torch.tensor([derive_seed(*self.seed, "dropout", step, row) for row in range(len(indices))])
        share = self._share(len(indices))
        indices = indices[share]
        return _Batch(
            winners=self.winners.latents_of_any_size(indices),
            losers=self.winners.latents_of_any_size(indices, "loser_latents") if self.loss.pairs else None,
            noise=noise[share],
            levels=levels[share],
            text=text[share],
            weights=self.winners.weights[indices],
            dropout_seeds=seeds[share],
        )

    def _share(self, total: int) -> slice:
        """Return the part of a batch that this process computes."""
        rank = self.accelerator.process_index
        count = self.accelerator.num_processes
        return slice(rank * total // count, (rank + 1) * total // count)

    def _backward(self, denoiser: torch.nn.Module, batch: _Batch) -> tuple[float, dict[str, float]]:
        """Add up gradients of the whole batch's mean loss over this process' share of it.

        Returns:
            The mean loss, and for a loss on pairs the means of `pair_metrics`, over the batches of all processes.
        """
        total = self.settings.batch_size
        size = self.runtime.train_batch_size or total
        means = torch.zeros(1, device=self.device)
        names: list[str] = []
        passes = [part for group in self._groups(batch) for part in batched(group, size)]
        for number, part in enumerate(passes, start=1):
            with contextlib.nullcontext() if number == len(passes) else self.accelerator.no_sync(denoiser):
                loss, errors = self._loss(denoiser, batch[part])
                loss = loss / total
                (loss * self.accelerator.num_processes).backward()  # gradients are averaged over processes
            names = list(errors)
            means = means + torch.stack([loss.detach(), *(value.sum() / total for value in errors.values())])
        loss_mean, *error_means = self.accelerator.reduce(means, "sum").tolist()
        return loss_mean, dict(zip(names, error_means, strict=True))

    def _groups(self, batch: _Batch) -> list[list[int]]:
        """Return the samples of a batch, grouped by what fits into one pass: one size, equally many chunks of text."""
        groups: dict[tuple[torch.Size, int], list[int]] = {}
        for sample, (noise, row) in enumerate(zip(batch.noise, batch.text.tolist(), strict=True)):
            groups.setdefault((noise.shape, self.texts.num_chunks(row)), []).append(sample)
        return list(groups.values())

    def _loss(self, denoiser: torch.nn.Module, batch: _Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of the weighted losses of a batch, and for a loss on pairs `pair_metrics`."""
        clean = torch.stack(batch.winners).float()
        noise = torch.stack(batch.noise)
        levels = batch.levels
        text = batch.text
        seeds = batch.dropout_seeds
        if batch.losers is not None:  # the same noise and noise level for both
            clean = torch.cat([clean, torch.stack(batch.losers).float()])
            noise, levels, text, seeds = (torch.cat([value, value]) for value in (noise, levels, text, seeds))
        noisy = self.schedule.noised(clean, noise, levels)
        timesteps = self.schedule.timesteps(levels)
        reference = None
        if self.loss.pairs:
            with torch.no_grad(), self.model.reference() as start:
                reference = self._predict(start, noisy, timesteps, text)
        if self.model.dropout:
            self.model.dropout.seeds = seeds.tolist()
        predicted = self._predict(denoiser, noisy, timesteps, text)
        target = self.schedule.target(clean, noise, levels).to(self.device)
        weight = self.schedule.weight(batch.levels, self.settings.snr_gamma).to(self.device)
        loss = (self.loss.function(predicted, reference, target, weight) * batch.weights.to(self.device)).sum()
        return loss, {} if reference is None else pair_metrics(predicted.detach(), reference, target)

    def _predict(
        self, denoiser: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        time_ids = self.time_ids(*noisy.shape[-2:]).expand(len(noisy), -1)
        mixed = self.settings.method == "full" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            x = noisy.to(self.device, self.dtype)
            predicted = denoiser(x, timesteps.to(self.device), self.texts[text.tolist()], time_ids)
        return predicted.float()

    @torch.no_grad()
    def _check_prediction_type(self) -> None:
        """Predict some noised winners and compare with the targets of all schedules and prediction types.

        Raises:
            UserError: others than the scheduler's fit the UNet.
        """
        one_size = self.winners.positions_by_shape(torch.arange(len(self.winners)))[0]
        indices = torch.tensor(one_size[:NUM_PROBES])
        clean = self.winners.latents(indices).float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(derive_seed(*self.seed, "probe")))
        size = self.runtime.train_batch_size or self.settings.batch_size

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            parts = zip(
                *(value.split(size) for value in (noisy, timesteps, self.winners.prompt_indices[indices])), strict=True
            )
            return torch.cat([self._predict(self.model.denoiser, *part).cpu() for part in parts])

        if problem := prediction_type_mismatch(self.schedule, predict, clean, noise):
            raise UserError(f"model.base: {problem}")

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
