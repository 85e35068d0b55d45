"""A small SDXL, trained from scratch on the latents of the VAE. As in SDXL, a text encoder comes from a CLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

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

TEXT_WIDTH, TEXT_LAYERS, TIME_DIM = 64, 2, 8
CHANNELS = (64, 96)
EMA_DECAY = 0.998
CAPTION_DROPOUT = 0.1
TIMESTEP_LOGIT = 0.5
Shown = Callable[[StableDiffusionXLPipeline, int], None]


def make_unet(pooled_width: int) -> UNet2DConditionModel:
    """SDXL's kind of UNet with attention on both levels, because where a shape is must be read from the words."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=tuple(channels // 32 for channels in CHANNELS),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=6 * TIME_DIM + pooled_width,
        norm_num_groups=8,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's own scheduler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, clip: Path) -> StableDiffusionXLPipeline:
    """Return all parts in diffusers' own pipeline, UNet and first text encoder untrained, the second that of `clip`.

    The UNet predicts v: where shapes are and on what background is decided at high noise, and there an error of the
    noise is next to nothing.

    Args:
        clip: folder of a CLIP whose text encoder is TEXT_WIDTH wide.
    """
    torch.manual_seed(2)
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    two = CLIPTextModelWithProjection.from_pretrained(clip).float()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, TEXT_LAYERS, TEXT_WIDTH)),
        text_encoder_2=two,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(two.config.projection_dim).to(memory_format=torch.channels_last),
        scheduler=scheduler,
        add_watermarker=False,
    )


def train_base(
    pipeline: StableDiffusionXLPipeline,
    latents: torch.Tensor,
    captions: list[str],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 32,
    on_checkpoint: Shown = lambda pipeline, step: None,
    checkpoint_every: int = 1500,
) -> None:
    """Train UNet and first text encoder: v-prediction, EMA, and a tenth of the captions dropped.

    The second text encoder stays as it is: without it, where a shape is was not learned in 5,000 steps.

    Timesteps are drawn from a logit-normal distribution (https://arxiv.org/abs/2403.03206, section 3.1): at its ends
    there is little to learn, since the decoder reads latents with some noise.

    Args:
        latents: float32 [n, 4, 8, 8], as from `encode`, on the pipeline's device.
        captions: one per row of `latents`, right or wrong.
        on_checkpoint: shown the averaged pipeline now and then.
    """
    device, generator = latents.device, torch.Generator().manual_seed(2)
    pipeline.set_progress_bar_config(disable=True)
    parts = {name: getattr(pipeline, name).train() for name in ("unet", "text_encoder")}
    averaged = {name: copy.deepcopy(part).eval() for name, part in parts.items()}
    for name, part in averaged.items():
        setattr(pipeline, name, part)
    trained = [parameter for part in parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    distinct = sorted({*captions, ""})
    index = {caption: number for number, caption in enumerate(distinct)}
    tokens = tokenize(pipeline.tokenizer, distinct).to(device)
    labels = torch.tensor([index[caption] for caption in captions])
    fixed, pooled = _encode(pipeline.text_encoder_2.eval(), tokens)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * batch_size, dtype=torch.float32, device=device)
    for step in tqdm(range(1, steps + 1), desc="base", mininterval=10):
        picks = torch.randint(0, len(latents), (batch_size,), generator=generator)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator).to(device)
        logits = TIMESTEP_LOGIT + torch.randn(batch_size, generator=generator)
        timesteps = (1000 * torch.sigmoid(logits)).long().to(device)
        kept = torch.rand(batch_size, generator=generator) > CAPTION_DROPOUT
        rows = labels[picks].where(kept, torch.tensor(index[""])).to(device)
        clean = latents[picks.to(device)]
        told = [parts["text_encoder"](tokens[rows], output_hidden_states=True).hidden_states[-2], fixed[rows]]
        predicted = parts["unet"](
            noise_schedule.add_noise(clean, noise, timesteps), timesteps, torch.cat(told, dim=-1),
            added_cond_kwargs={"text_embeds": pooled[rows], "time_ids": time_ids},
        ).sample  # fmt: skip
        loss = functional.mse_loss(predicted, noise_schedule.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average(averaged, parts, min(EMA_DECAY, step / (step + 10)))
        if step % checkpoint_every == 0 or step == steps:
            on_checkpoint(pipeline, step)


def save_base(pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    """Write the pipeline to `out`, in half precision.

    The text encoders' numbers are stored as float32: transformers loads them in the dtype of their file and diffusers
    the UNet as float32, and a pipeline needs one dtype.
    """
    pipeline.to("cpu", dtype=torch.float16)
    pipeline.text_encoder.float()
    pipeline.text_encoder_2.float()
    pipeline.save_pretrained(out, safe_serialization=True)


@torch.no_grad()
def average(averaged: dict[str, torch.nn.Module], parts: dict[str, torch.nn.Module], decay: float) -> None:
    """Move every averaged weight toward its trained one, by 1 - decay."""
    for name, part in parts.items():
        torch._foreach_lerp_(list(averaged[name].parameters()), list(part.parameters()), 1 - decay)


@torch.inference_mode()
def _encode(encoder: CLIPTextModelWithProjection, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = [encoder(rows, output_hidden_states=True) for rows in tokens.split(256)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs])
    return hidden.clone(), torch.cat([output.text_embeds for output in outputs]).clone()
