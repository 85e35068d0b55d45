"""The base of the open world: a small SDXL whose text encoders are those of the two CLIPs, as they are, like SDXL's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.base import make_scheduler
from demo.open_world.scenes import SIZE
from demo.text import tokenize

TIME_DIM = 8
CHANNELS = (64, 96)
EMA_DECAY = 0.998
LEARNING_RATE = 1.5e-3
Shown = Callable[[StableDiffusionXLPipeline, int], None]


def make_unet(text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """SDXL's kind of UNet with attention on both levels, because where a shape is must be read from the words."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=tuple(channels // 32 for channels in CHANNELS),
        cross_attention_dim=text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=6 * TIME_DIM + pooled_width,
        norm_num_groups=8,
    )


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, clips: tuple[Path, Path]) -> StableDiffusionXLPipeline:
    """Return all parts in diffusers' own pipeline, the UNet untrained, all in float32.

    The UNet predicts v: where shapes are and on what background is decided at high noise, and there an error of the
    noise is next to nothing.
    """
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    one = CLIPTextModel.from_pretrained(clips[0]).float().eval()
    two = CLIPTextModelWithProjection.from_pretrained(clips[1]).float().eval()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(one.config.hidden_size + two.config.hidden_size, two.config.projection_dim),
        scheduler=scheduler,
        add_watermarker=False,
    )


def train_base(
    latents: torch.Tensor,
    captions: list[str],
    pipeline: StableDiffusionXLPipeline,
    out: Path,
    *,
    steps: int,
    batch_size: int = 32,
    on_checkpoint: Shown = lambda pipeline, step: None,
    checkpoint_every: int = 1500,
) -> None:
    """Train the UNet and write the pipeline to `out`, in half precision: v-prediction, EMA, and a tenth of the captions
    dropped.

    Each caption is encoded once, since the text encoders stay as they are. They are stored in float32: transformers
    loads them in the dtype of their file and diffusers the UNet in float32, and a pipeline needs one dtype.

    Args:
        latents: float32 [n, 4, 8, 8], as from `encode`, on the device to train on.
        captions: one per row of `latents`, right or wrong.
        on_checkpoint: shown the averaged pipeline now and then.
    """
    torch.manual_seed(2)
    device, generator = latents.device, torch.Generator().manual_seed(2)
    pipeline.to(device).set_progress_bar_config(disable=True)
    distinct = sorted({*captions, ""})
    hidden, pooled = _encode(pipeline, distinct)
    index = {caption: number for number, caption in enumerate(distinct)}
    labels = torch.tensor([index[caption] for caption in captions])
    unet = make_unet(hidden.shape[-1], pooled.shape[-1]).to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(unet).eval()
    pipeline.unet = averaged
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * batch_size, dtype=torch.float32, device=device)
    for step in tqdm(range(1, steps + 1), desc="base", mininterval=10):
        picks = torch.randint(0, len(latents), (batch_size,), generator=generator)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator).to(device)
        timesteps = torch.randint(0, 1000, (batch_size,), generator=generator).to(device)
        kept = torch.rand(batch_size, generator=generator) > 0.1
        rows = labels[picks].where(kept, torch.tensor(index[""])).to(device)
        clean = latents[picks.to(device)]
        predicted = unet(
            noise_schedule.add_noise(clean, noise, timesteps), timesteps, hidden[rows],
            added_cond_kwargs={"text_embeds": pooled[rows], "time_ids": time_ids},
        ).sample  # fmt: skip
        loss = functional.mse_loss(predicted, noise_schedule.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(unet.parameters()), 1 - decay)
        if step % checkpoint_every == 0 or step == steps:
            on_checkpoint(pipeline, step)
    pipeline.to("cpu", dtype=torch.float16)
    pipeline.text_encoder.float()
    pipeline.text_encoder_2.float()
    pipeline.save_pretrained(out, safe_serialization=True)


@torch.inference_mode()
def _encode(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = tokenize(pipeline.tokenizer, captions).to(pipeline.device)
    parts = []
    for rows in tokens.split(256):
        one = pipeline.text_encoder(rows, output_hidden_states=True)
        two = pipeline.text_encoder_2(rows, output_hidden_states=True)
        parts.append((torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds))
    hidden, pooled = (torch.cat(values).clone() for values in zip(*parts, strict=True))
    return hidden, pooled
