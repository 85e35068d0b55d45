"""How training adds noise and what the UNet predicts, as the base model was trained.

Two families: the discrete schedule of DDPM, for every SDXL scheduler that has one (Euler, DDIM, DPM++, LCM, ...), and
EDM's preconditioning (Karras et al., 2022, arXiv:2206.00364). Flow matching is refused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from srpo.errors import UserError
from srpo.lineage.checkpoint_files import EDM_WEIGHTS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
EDM_PREDICTION_TYPES = ("epsilon", "v_prediction")
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDM_LOG_SIGMA_MEAN = -1.2  # table 1 of the EDM paper, for data with a standard deviation of 0.5
EDM_LOG_SIGMA_STD = 1.2
EDM_PAPER_SIGMA_DATA = 0.5
MAX_FITTING_ERROR = 0.5


class NoiseSchedule(ABC):
    """Noise levels, noised inputs and prediction targets.

    A `level` is one number per sample: an int64 timestep of DDPM, or a float32 sigma of EDM.
    """

    prediction_type: str

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the prediction type, with the family where that is not DDPM."""

    @abstractmethod
    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the noise levels of a batch from the distribution that training uses, [count]."""

    @abstractmethod
    def spread_levels(self, count: int) -> Tensor:
        """Return levels from the middle of the schedule to its end, [count]."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the UNet's input: noised latents, scaled as the UNet expects them, float32 [n, channels, h, w]."""

    @abstractmethod
    def timesteps(self, levels: Tensor) -> Tensor:
        """Return the UNet's timestep of each level, [n]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the target of the UNet's prediction, float32 [n, channels, h, w]."""

    @abstractmethod
    def weight(self, levels: Tensor, snr_gamma: float | None) -> Tensor:
        """Return min-SNR loss weights, finite float32 [n]; ones if `snr_gamma` is None."""

    @abstractmethod
    def alternatives(self) -> list[NoiseSchedule]:
        """Return every other schedule that a UNet may have been trained with, by family and prediction type."""


class DiscreteSchedule(NoiseSchedule):
    """DDPM's schedule (Ho et al., 2020) with its betas, also rescaled to zero terminal SNR (Lin et al., 2023)."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self._scheduler = scheduler
        self._num_timesteps: int = scheduler.config.num_train_timesteps
        self.prediction_type: str = scheduler.config.prediction_type

    @property
    def name(self) -> str:
        """Return the prediction type."""
        return self.prediction_type

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw uniform timesteps."""
        return torch.randint(0, self._num_timesteps, (count,), generator=generator)

    def spread_levels(self, count: int) -> Tensor:
        """Return timesteps of the noisier half."""
        return torch.linspace(self._num_timesteps // 2, self._num_timesteps - 1, count).long()

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise."""
        return self._scheduler.add_noise(clean, noise, levels)

    def timesteps(self, levels: Tensor) -> Tensor:
        """Return the levels, which are the timesteps."""
        return levels

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the noise, v (Salimans and Ho, 2022) or the clean latents."""
        if self.prediction_type == "v_prediction":
            return self._scheduler.get_velocity(clean, noise, levels)
        return clean if self.prediction_type == "sample" else noise

    def weight(self, levels: Tensor, snr_gamma: float | None) -> Tensor:
        """Return min(SNR, gamma), divided by SNR for epsilon and by SNR + 1 for v (Hang et al., 2023)."""
        if snr_gamma is None:
            return torch.ones(len(levels))
        alpha = self._scheduler.alphas_cumprod[levels]
        snr = alpha / (1 - alpha)
        if self.prediction_type == "epsilon":
            return (snr_gamma / snr).clamp(max=1)  # the same number, and finite at SNR 0
        clipped = snr.clamp(max=snr_gamma)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped

    def alternatives(self) -> list[NoiseSchedule]:
        """Return this schedule with every other prediction type, and EDM's."""
        others = (name for name in PREDICTION_TYPES if name != self.prediction_type)
        return [
            *(DiscreteSchedule(DDPMScheduler.from_config(self._scheduler.config, prediction_type=n)) for n in others),
            *(EdmSchedule(EDMEulerScheduler(prediction_type=name)) for name in EDM_PREDICTION_TYPES),
        ]


class EdmSchedule(NoiseSchedule):
    """EDM: log-normal sigmas; the UNet sees latents / sqrt(sigma^2 + sigma_data^2) and log(sigma) / 4.

    The clean latents are c_skip * noised + c_out * prediction, so the target is (clean - c_skip * noised) / c_out, and
    the loss weight of the paper is 1 in these units.
    """

    def __init__(self, scheduler: EDMEulerScheduler) -> None:
        self._scheduler = scheduler
        self.prediction_type: str = scheduler.config.prediction_type
        # in units of the data, so that the ratio of signal to noise is the paper's
        self._log_sigma_mean = EDM_LOG_SIGMA_MEAN + math.log(scheduler.config.sigma_data / EDM_PAPER_SIGMA_DATA)

    @property
    def name(self) -> str:
        """Return the prediction type and the family."""
        return f"{self.prediction_type} of EDM"

    def draw_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw log-normal sigmas."""
        return torch.exp(self._log_sigma_mean + EDM_LOG_SIGMA_STD * torch.randn(count, generator=generator))

    def spread_levels(self, count: int) -> Tensor:
        """Return sigmas from the median to two standard deviations above."""
        return torch.exp(self._log_sigma_mean + EDM_LOG_SIGMA_STD * torch.linspace(0, 2, count))

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return (clean + sigma * noise) / sqrt(sigma^2 + sigma_data^2)."""
        sigma = _per_sample(levels)
        return self._scheduler.precondition_inputs(clean + sigma * noise, sigma)

    def timesteps(self, levels: Tensor) -> Tensor:
        """Return log(sigma) / 4."""
        return self._scheduler.precondition_noise(levels)

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return what makes c_skip * noised + c_out * target the clean latents."""
        sigma = _per_sample(levels)
        zero = torch.zeros_like(clean)
        noisy = clean + sigma * noise
        skipped = self._scheduler.precondition_outputs(noisy, zero, sigma)
        scale = self._scheduler.precondition_outputs(zero, torch.ones_like(clean), sigma)
        return (clean - skipped) / scale

    def weight(self, levels: Tensor, snr_gamma: float | None) -> Tensor:
        """Return ones.

        Raises:
            UserError: `snr_gamma` is set.
        """
        if snr_gamma is not None:
            raise UserError(f"train.snr_gamma: {EDM_WEIGHTS}")
        return torch.ones(len(levels))

    def alternatives(self) -> list[NoiseSchedule]:
        """Return this schedule with the other sign of c_out, and DDPM's with SDXL's betas."""
        others = (name for name in EDM_PREDICTION_TYPES if name != self.prediction_type)
        return [
            *(EdmSchedule(EDMEulerScheduler.from_config(self._scheduler.config, prediction_type=n)) for n in others),
            *(DiscreteSchedule(DDPMScheduler(prediction_type=name, **SDXL_BETAS)) for name in PREDICTION_TYPES),
        ]


def make_noise_schedule(scheduler: Any) -> NoiseSchedule:
    """Return the schedule that a base with this diffusers scheduler was trained with.

    Raises:
        UserError: training does not support the kind of scheduler or its prediction type.
    """
    name = type(scheduler).__name__
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if isinstance(scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler):
        supported: tuple[str, ...] = EDM_PREDICTION_TYPES
    elif hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas"):
        supported = PREDICTION_TYPES
    else:
        raise UserError(
            f"model.base: training does not support its scheduler {name};"
            " take a base with a DDPM schedule or of the EDM kind"
        )
    if prediction_type not in supported:
        raise UserError(
            f"model.base: training does not support prediction_type {prediction_type!r} of its scheduler {name};"
            f" supported are {', '.join(supported)}"
        )
    if supported is EDM_PREDICTION_TYPES:
        return EdmSchedule(EDMEulerScheduler.from_config(scheduler.config))
    return DiscreteSchedule(DDPMScheduler.from_config(scheduler.config))


def prediction_type_mismatch(
    schedule: NoiseSchedule, predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noise: Tensor
) -> str | None:
    """Return what is wrong if the UNet was trained with another schedule or prediction type than this one, else None.

    An error is relative to that of predicting zero. Another type fits if its error is below 0.5 and below half of the
    schedule's own; a UNet that has learned nothing has an error of 1 for all.

    Args:
        predict: (UNet's input, timesteps) to the UNet's prediction, called once per family of schedules.
        clean: latents, float32 [n, channels, h, w], as is `noise`.
    """
    predicted: dict[type[NoiseSchedule], Tensor] = {}

    def error(candidate: NoiseSchedule) -> float:
        family = type(candidate)
        levels = candidate.spread_levels(len(clean))
        if family not in predicted:
            predicted[family] = predict(candidate.noised(clean, noise, levels), candidate.timesteps(levels))
        target = candidate.target(clean, noise, levels)
        return float((predicted[family] - target).pow(2).mean() / target.pow(2).mean())

    own = error(schedule)
    errors = {candidate.name: (error(candidate), candidate) for candidate in schedule.alternatives()}
    name, (lowest, best) = min(errors.items(), key=lambda item: item[1][0])
    if lowest >= min(MAX_FITTING_ERROR, own / 2):
        return None
    if isinstance(best, type(schedule)):
        remedy = "set prediction_type in model.scheduler_config"
    else:
        remedy = "give the base the scheduler/scheduler_config.json that it was trained with"
    return (
        f"its scheduler says prediction_type {schedule.name}, but its UNet predicts {name}"
        f" (error {lowest:.2g}, not {own:.2g}); {remedy}"
    )


def _per_sample(levels: Tensor) -> Tensor:
    return levels.view(-1, 1, 1, 1)
