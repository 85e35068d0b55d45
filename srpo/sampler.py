"""Sampling from SDXL: encode prompts, denoise, decode.

Results do not depend on the batch size. Noise comes from one CPU generator per image, and on a CPU the
networks always see tiles of one fixed shape, because CPU kernels choose their order of summation by shape.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from srpo.adapters import with_adapter
from srpo.device import load_quietly, pick_device, pick_dtype
from srpo.errors import UserError
from srpo.params import Params
from srpo.sections import ModelParams

log = logging.getLogger("srpo")
CPU_TILE = 32


@dataclass(frozen=True)
class PromptEmbeds:
    """Text conditioning of n prompts: `tokens` [n, length, dim] and `pooled` [n, pooled_dim]."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows: Sequence[int]) -> PromptEmbeds:
        return PromptEmbeds(self.tokens[rows], self.pooled[rows])


def load_pipeline(model: ModelParams, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """The base pipeline, from the Hub or a local folder, safetensors only.

    Raises:
        UserError: it can't be had or is no SDXL pipeline.
    """
    load_quietly()
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            model.base, revision=model.revision, variant=model.variant, dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.base: can't load {model.base!r} as an SDXL pipeline: {reason:.200}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Sampler:
    """A base pipeline, with an adapter merged in when one is given."""

    def __init__(self, params: Params, adapter: Path | None = None) -> None:
        """Load the model.

        Args:
            params: `model` and `runtime` are used.
            adapter: folder of a LoRA or a UNet in diffusers' layout; one without weights (base's) is no adapter.
        """
        self.device = pick_device(params.runtime)
        dtype = pick_dtype(params.runtime, self.device)
        pipeline = load_pipeline(params.model, dtype)
        if adapter is not None:
            pipeline.unet = with_adapter(pipeline.unet, adapter)
        if pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        pipeline.to(self.device)
        self.pipeline, self.unet, self.vae = pipeline, pipeline.unet.eval(), pipeline.vae.eval()
        self.tile = CPU_TILE if self.device.type == "cpu" else None
        self.batch_size = params.runtime.batch_size

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Conditioning of `prompts`, with the empty prompt's appended as the last row."""
        tokens, no_tokens, pooled, no_pooled = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return PromptEmbeds(torch.cat([tokens, no_tokens[:1]]), torch.cat([pooled, no_pooled[:1]]))

    def noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """Unit noise, float32 [n, channels, height / 8, width / 8], one CPU generator per seed."""
        factor = self.pipeline.vae_scale_factor
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @torch.inference_mode()
    def denoise(
        self,
        noise: torch.Tensor,
        embeds: PromptEmbeds,
        empty: PromptEmbeds,
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Final latents, float32 [n, channels, h, w] on the CPU, for unit noise of the same shape.

        Args:
            noise: as from `noise`.
            embeds: conditioning, one row per image.
            empty: conditioning of the empty prompt, one row; used when guidance_scale > 1.
            num_inference_steps: scheduler steps.
            guidance_scale: classifier-free guidance (Ho and Salimans, 2022): e_0 + g * (e_c - e_0).
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = noise.to(self.device, torch.float32) * scheduler.init_noise_sigma
        count, guided = len(noise), guidance_scale > 1
        tokens, pooled = embeds.tokens, embeds.pooled
        if guided:
            tokens = torch.cat([empty.tokens.expand(count, -1, -1), tokens])
            pooled = torch.cat([empty.pooled.expand(count, -1), pooled])
        time_ids = self.time_ids(noise.shape[-2], noise.shape[-1]).expand(len(tokens), -1)
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
            rows = torch.cat([model_input] * 2) if guided else model_input
            predicted = self._unet(rows, timestep, tokens, pooled, time_ids).float()
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents.cpu()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [n, height, width, 3] on the CPU, of final latents [n, channels, h, w]."""
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = self._tiled(lambda x: self.vae.decode(x, return_dict=False)[0], scaled)
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()

    def time_ids(self, latent_height: int, latent_width: int) -> torch.Tensor:
        """SDXL's size conditioning [1, 6]: original size, crop corner (0, 0), target size, in pixels."""
        size = [latent_height * self.pipeline.vae_scale_factor, latent_width * self.pipeline.vae_scale_factor]
        return torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.unet.dtype)

    def _unet(self, rows, timestep, tokens, pooled, time_ids) -> torch.Tensor:
        def run(x, tok, pool, ids):
            conditions = {"text_embeds": pool, "time_ids": ids}
            return self.unet(x, timestep, tok, added_cond_kwargs=conditions, return_dict=False)[0]

        return self._tiled(run, rows, tokens, pooled, time_ids)

    def _tiled(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        if self.tile is None:
            return function(*tensors)
        parts = []
        for start in range(0, len(tensors[0]), self.tile):
            chunk = [tensor[start : start + self.tile] for tensor in tensors]
            missing = self.tile - len(chunk[0])
            padded = [torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]) if missing else t for t in chunk]
            parts.append(function(*padded)[: self.tile - missing])
        return torch.cat(parts)


def sample_images(
    sampler: Sampler,
    embeds: PromptEmbeds,
    rows: Sequence[int],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    on_images: Callable[[int], None] = lambda count: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample image i from `embeds` row `rows[i]` and seed `seeds[i]`; prompts and candidates mix in a batch.

    When the device's memory does not hold `sampler.batch_size` images, that is halved for good and the run goes on.

    Args:
        embeds: from `Sampler.encode`; its last row is the empty prompt.
        on_images: called with the number of images after each micro-batch.

    Returns:
        Latents float16 [n, channels, h, w], and the pixels decoded from exactly those, uint8 [n, height, width, 3].

    Raises:
        torch.OutOfMemoryError: there is not even room for one image.
    """
    empty, latents, images, done = embeds[[-1]], [], [], 0
    while done < len(rows):
        batch = range(done, min(done + sampler.batch_size, len(rows)))
        try:
            final = sampler.denoise(
                sampler.noise([seeds[i] for i in batch], height, width),
                embeds[[rows[i] for i in batch]],
                empty,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).half()
            decoded = sampler.decode(final)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            sampler.batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            log.warning("out of memory with %d images at once; going on with %d", len(batch), sampler.batch_size)
            continue
        latents.append(final)
        images.append(decoded)
        done = batch.stop
        on_images(len(batch))
    return torch.cat(latents), torch.cat(images)
