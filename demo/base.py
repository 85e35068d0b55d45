"""A small SDXL, trained from scratch: first the VAE, then UNet and both text encoders together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.scenes import SIZE
from demo.text import text_config, tokenize

TEXT_WIDTH, TIME_DIM = 48, 8
KL_WEIGHT = 1e-4
EMA_DECAY = 0.998


def make_vae() -> AutoencoderKL:
    """SDXL's autoencoder at toy width: the same factor 8 and the same four latent channels."""
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


def train_vae(images: np.ndarray, *, steps: int, batch_size: int = 16) -> AutoencoderKL:
    """Reconstruction (L1 and L2) with a light KL term; sets `scaling_factor` so that latents have unit variance.

    Args:
        images: uint8 [n, 64, 64, 3].
    """
    torch.manual_seed(1)
    vae, rng = make_vae().train(), np.random.default_rng(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="vae", mininterval=10):
        batch = _unit(images[rng.integers(0, len(images), batch_size)])
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
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
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Latent means times the scaling factor, float32 [n, 4, 8, 8]."""
    parts = [vae.encode(_unit(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(parts).clone() * vae.config.scaling_factor


def make_unet() -> UNet2DConditionModel:
    """SDXL's kind of UNet: text_time conditioning, linear projections, attention in the lower level only."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96),
        layers_per_block=1,
        attention_head_dim=(1, 3),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=6 * TIME_DIM + TEXT_WIDTH,
        norm_num_groups=8,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own scheduler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """All parts in diffusers' own pipeline, UNet and text encoders untrained."""
    config = text_config(tokenizer, TEXT_WIDTH, 3, TEXT_WIDTH)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        add_watermarker=False,
    )


def train_base(
    latents: torch.Tensor,
    captions: list[str],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    out: Path,
    *,
    steps: int,
    batch_size: int = 64,
    on_checkpoint: Callable[[StableDiffusionXLPipeline, int], None] = lambda pipeline, step: None,
    checkpoint_every: int = 1000,
) -> None:
    """Train and save the pipeline: epsilon prediction, a tenth of the captions dropped, EMA.

    Args:
        latents: [n, 4, 8, 8], as from `encode`.
        captions: one per row of `latents`, right or wrong.
        on_checkpoint: shown the averaged pipeline now and then.
    """
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(2)
    pipeline = make_pipeline(vae, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    parts = {name: getattr(pipeline, name).train() for name in ("unet", "text_encoder", "text_encoder_2")}
    averaged = {name: copy.deepcopy(part).eval() for name, part in parts.items()}
    trained = [parameter for part in parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    distinct = sorted({*captions, ""})
    tokens = tokenize(tokenizer, distinct)
    labels = torch.tensor([distinct.index(caption) for caption in captions])
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * batch_size, dtype=torch.float32)
    for step in tqdm(range(1, steps + 1), desc="base", mininterval=10):
        picks = torch.randint(0, len(latents), (batch_size,), generator=generator)
        clean, noise = latents[picks], torch.randn((batch_size, *latents.shape[1:]), generator=generator)
        timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
        rows = labels[picks].where(torch.rand(batch_size, generator=generator) > 0.1, torch.tensor(distinct.index("")))
        hidden, pooled = _text_embeds(parts, tokens[rows])
        predicted = parts["unet"](
            noise_schedule.add_noise(clean, noise, timesteps), timesteps, hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample  # fmt: skip
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average(averaged, parts, min(EMA_DECAY, step / (step + 10)))
        if step % checkpoint_every == 0 or step == steps:
            for name, part in averaged.items():
                setattr(pipeline, name, part)
            on_checkpoint(pipeline, step)
    for name, part in averaged.items():
        setattr(pipeline, name, part)
    save_base(pipeline, out)


def save_base(pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    """Write the pipeline to `out`, in half precision.

    The text encoders' numbers are stored as float32: transformers loads them in the dtype of their file and diffusers
    the UNet as float32, and a pipeline needs one dtype.
    """
    pipeline.to("cpu", dtype=torch.float16)
    pipeline.text_encoder.float()
    pipeline.text_encoder_2.float()
    pipeline.save_pretrained(out, safe_serialization=True)


def _text_embeds(parts: dict[str, torch.nn.Module], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one = parts["text_encoder"](tokens, output_hidden_states=True)
    two = parts["text_encoder_2"](tokens, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


@torch.no_grad()
def average(averaged: dict[str, torch.nn.Module], parts: dict[str, torch.nn.Module], decay: float) -> None:
    """Move every averaged weight toward its trained one, by 1 - decay."""
    for name, part in parts.items():
        torch._foreach_lerp_(list(averaged[name].parameters()), list(part.parameters()), 1 - decay)


def _unit(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
