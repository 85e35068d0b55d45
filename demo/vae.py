"""The VAE of the tiny world, trained from scratch."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from demo.scenes import SIZE

KL_WEIGHT = 1e-6
LEARNING_RATE = 2e-3
BATCH_SIZE = 8
SHAPE_WEIGHT = 5.0
"""Of a pixel of a shape; one of the background has weight 1, and most are."""
NOISE = 0.7
"""Largest noise on the latents that the decoder learns to read, in their standard deviations."""
ENCODER_SHARE = 1 / 3
"""Of the steps, in which the encoder learns along; after them the decoder learns alone, at a new learning rate."""


def make_vae() -> AutoencoderKL:
    """Return SDXL's autoencoder at toy width: the same factor 8 and the same four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )


def train_vae(images: torch.Tensor, *, steps: int) -> AutoencoderKL:
    """Learn to reconstruct (L1 and L2) with a light KL term; set `scaling_factor` so that latents have unit variance.

    The latents are noised before they are decoded, so that a latent of the UNet that is nearly right becomes a sharp
    outline. Outlines are what a small UNet learns last.

    Args:
        images: uint8 [n, 3, 64, 64], on the device to train on.
    """
    torch.manual_seed(1)
    vae, rng = make_vae().train().to(images.device), np.random.default_rng(1)
    together = max(1, int(steps * ENCODER_SHARE))
    _train(vae, images, list(vae.parameters()), together, rng)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    _train(vae, images, [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], steps - together, rng)
    vae.requires_grad_(True).eval()
    latents = encode(vae, images[:1024])
    vae.register_to_config(scaling_factor=float(vae.config.scaling_factor / latents.std()))
    return vae


def _train(
    vae: AutoencoderKL, images: torch.Tensor, trained: list[torch.nn.Parameter], steps: int, rng: np.random.Generator
) -> None:
    noise = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="vae", mininterval=10):
        picks = torch.from_numpy(rng.integers(0, len(images), BATCH_SIZE)).to(images.device)
        batch = _unit(images[picks])
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            strength = NOISE * torch.rand((BATCH_SIZE, 1, 1, 1), generator=noise)
            drawn = (strength * torch.randn(posterior.mean.shape, generator=noise)).to(images.device)
            decoded = vae.decode(posterior.mean + drawn * posterior.mean.detach().std()).sample.float()
        error = (decoded - batch).square() + 0.1 * (decoded - batch).abs()
        loss = (_weights(batch) * error).mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _weights(batch: torch.Tensor) -> torch.Tensor:
    """Return pixels' weights, mean 1: float32 [n, 1, 64, 64]. No shape reaches the corner of an image."""
    shape = (batch - batch[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    weights = torch.where(shape, SHAPE_WEIGHT, 1.0)
    return weights / weights.mean()


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return latent means times the scaling factor, float32 [n, 4, 8, 8]."""
    parts = [vae.encode(_unit(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(parts).clone() * vae.config.scaling_factor


def _unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1
