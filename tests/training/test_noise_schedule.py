"""Noise, targets and weights of every parametrization, against diffusers' schedulers and the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from srpo.errors import UserError
from srpo.training.noise_schedule import NoiseSchedule, make_noise_schedule, prediction_type_mismatch

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHAPE = (3, 4, 2, 2)
DISCRETE = ["epsilon", "v_prediction", "sample"]
EDM = ["epsilon", "v_prediction"]


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator) / 2, torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("prediction", DISCRETE)
def test_a_perfect_prediction_gives_the_clean_latents(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    schedule = make_noise_schedule(scheduler)
    clean, noise = drawn()
    for level in (20, 400, 999):
        levels = torch.full((3,), level)
        target = schedule.target(clean, noise, levels)
        noised = schedule.noised(clean, noise, levels)
        assert torch.equal(schedule.timesteps(levels), levels)
        predicted = scheduler.step(target, level, noised).pred_original_sample
        assert torch.allclose(predicted, clean, atol=1e-3)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction", EDM)
def test_edm_denoises_as_its_scheduler_does(kind: type, prediction: str) -> None:
    scheduler = kind(prediction_type=prediction)
    schedule = make_noise_schedule(scheduler)
    clean, noise = drawn()
    levels = torch.tensor([0.01, 0.5, 60.0])
    sigma = levels.view(-1, 1, 1, 1)
    noised = schedule.noised(clean, noise, levels)
    assert torch.allclose(noised, (clean + sigma * noise) / (sigma**2 + 0.25).sqrt(), atol=1e-5)
    assert torch.allclose(schedule.timesteps(levels), levels.log() / 4)
    denoised = scheduler.precondition_outputs(clean + sigma * noise, schedule.target(clean, noise, levels), sigma)
    assert torch.allclose(denoised, clean, atol=1e-4)
    drawn_levels = schedule.draw_levels(20_000, torch.Generator().manual_seed(0)).log()
    assert (drawn_levels.mean().item(), drawn_levels.std().item()) == pytest.approx((-1.2, 1.2), abs=0.05)
    assert schedule.weight(levels, None).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"train\.snr_gamma: .* EDM"):
        schedule.weight(levels, 5.0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", DISCRETE)
def test_min_snr_weights_are_the_papers_and_finite(prediction: str, zero_snr: bool) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    schedule = make_noise_schedule(scheduler)
    alpha = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    assert (snr[-1].item() == 0) == zero_snr
    clipped = snr.clamp(max=5.0)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    if zero_snr and prediction == "epsilon":
        expected[-1] = 1.0  # the limit
    weight = schedule.weight(torch.arange(1000), 5.0)
    assert weight.isfinite().all() and torch.allclose(weight.double(), expected, rtol=1e-3)
    assert schedule.weight(torch.arange(3), None).tolist() == [1, 1, 1]


def test_other_kinds_of_bases_are_refused() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(
            UserError, match=rf"model\.base: .* does not support its scheduler {type(scheduler).__name__}"
        ):
            make_noise_schedule(scheduler)
    with pytest.raises(UserError, match="prediction_type 'flow_prediction'"):
        make_noise_schedule(UniPCMultistepScheduler(prediction_type="flow_prediction"))


def trained(schedule: NoiseSchedule, clean: torch.Tensor, noise: torch.Tensor) -> Predict:
    """Return a UNet that was trained well with this schedule, and predicts nothing for other noise levels."""
    levels = schedule.spread_levels(3)
    known = schedule.timesteps(levels)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if torch.equal(timesteps.float(), known.float()):
            return 0.9 * schedule.target(clean, noise, levels)
        return torch.zeros(SHAPE)

    return predict


@pytest.mark.parametrize("told", [DDPMScheduler(), EDMEulerScheduler()])
@pytest.mark.parametrize("real", DISCRETE)
def test_the_other_family_is_recognized(told: SchedulerMixin, real: str) -> None:
    other = DDPMScheduler if isinstance(told, EDMEulerScheduler) else EDMEulerScheduler
    if other is EDMEulerScheduler and real not in EDM:
        pytest.skip("EDM has no such prediction type")
    clean, noise = drawn()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = betas if other is DDPMScheduler else {}
    unet = trained(make_noise_schedule(other(prediction_type=real, **options)), clean, noise)
    problem = prediction_type_mismatch(make_noise_schedule(told), unet, clean, noise)
    assert problem and f"but its UNet predicts {real}" in problem and "scheduler_config.json" in problem


@pytest.mark.parametrize(
    ("kind", "types"), [(DDPMScheduler, DISCRETE), (EDMEulerScheduler, EDM)], ids=["discrete", "edm"]
)
def test_a_wrong_prediction_type_is_recognized(kind: type, types: list[str]) -> None:
    clean, noise = drawn()
    schedules = {name: make_noise_schedule(kind(prediction_type=name)) for name in types}
    for told, schedule in schedules.items():
        for real, other in schedules.items():
            problem = prediction_type_mismatch(schedule, trained(other, clean, noise), clean, noise)
            assert (problem is None) == (told == real)
            assert problem is None or f"says prediction_type {schedule.name}, but its UNet predicts {real}" in problem
        assert prediction_type_mismatch(schedule, lambda noisy, timesteps: torch.zeros(SHAPE), clean, noise) is None
