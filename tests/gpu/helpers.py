"""Settings of a device, and samplers on it."""

from __future__ import annotations

import pytest
import torch

from srpo.config.loader import Params
from srpo.sampling.sampler import Sampler, sample_images
from tests.support.world import sampling_params
from tests.training.helpers import with_runtime

DEVICE = "cuda"
PROMPTS = ["a red circle", "a blue square", "a green circle"]
ROWS, SEEDS = [0, 1, 2, 0, 1, 2], [11, 12, 13, 14, 15, 16]

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(params: Params, device: str = DEVICE, dtype: str = "float32", **values) -> Params:
    """Return the params with this device and number format."""
    return with_runtime(params, device=device, dtype=dtype, **values)


def sampled(sampler: Sampler, count: int = len(SEEDS)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 latents and uint8 pixels of the first images."""
    latents, images = sample_images(
        sampler, sampler.encode(PROMPTS), ROWS[:count], SEEDS[:count], sampling_params(5, 4.0)
    )
    return latents.float(), images


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, in units of the expected values' standard deviation."""
    return ((found - expected).square().mean().sqrt() / expected.std()).item()
