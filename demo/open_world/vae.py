"""The VAE of the open world, trained from scratch."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from tqdm import tqdm

from demo.base import make_vae

KL_WEIGHT = 1e-6


def train_vae(images: torch.Tensor, *, steps: int, batch_size: int = 16) -> AutoencoderKL:
    """Reconstruction (L1 and L2) with a light KL term; sets `scaling_factor` so that latents have unit variance.

    Args:
        images: uint8 [n, 3, 64, 64], on the device to train on.
    """
    torch.manual_seed(1)
    vae, rng = make_vae().train().to(images.device), np.random.default_rng(1)
    noise = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="vae", mininterval=10):
        picks = torch.from_numpy(rng.integers(0, len(images), batch_size)).to(images.device)
        batch = _unit(images[picks])
        posterior = vae.encode(batch).latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=noise).to(images.device)
        decoded = vae.decode(posterior.mean + posterior.std * drawn).sample
        loss = functional.mse_loss(decoded, batch) + 0.1 * functional.l1_loss(decoded, batch)
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval()
    latents = encode(vae, images[:1024])
    vae.register_to_config(scaling_factor=float(vae.config.scaling_factor / latents.std()))
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return latent means times the scaling factor, float32 [n, 4, 8, 8]."""
    parts = [vae.encode(_unit(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(parts).clone() * vae.config.scaling_factor


def _unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1
