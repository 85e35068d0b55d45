"""Sampling from SDXL: encode prompts, denoise, decode.

Results do not depend on the batch size. Noise comes from one CPU generator per image, and on a CPU the
networks always see tiles of one fixed shape.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import StableDiffusionXLPipeline

from srpo.config.loader import Params
from srpo.models.adapters import with_adapter
from srpo.models.pipeline import TEXT_PARTS, load_pipeline
from srpo.runtime.device import pick_device, pick_dtype, speed_up
from srpo.sampling.batch_invariant import Tiles
from srpo.sampling.conditioning import PromptEmbeds

log = logging.getLogger("srpo")
# rows of a tile on a CPU
UNET_TILE = 64
DECODER_TILE = 32
TEXT_TILE = 32
DECODED_AT_ONCE = 8  # on CUDA: a decoder takes far more memory for a picture than the UNet
T, R = TypeVar("T"), TypeVar("R")


class Sampler:
    """A base pipeline, with an adapter merged in when one is given."""

    def __init__(self, params: Params, adapter: Path | None = None, *, fast: bool = False) -> None:
        """Load the model; its text encoders come when they are first needed.

        Args:
            params: `model` and `runtime` are used.
            adapter: folder of a LoRA or a UNet in diffusers' layout; one without weights (base's) is no adapter.
            fast: on CUDA, lay the weights out for sampling; what trains them needs them as they are.
        """
        self.model, self.device = params.model, pick_device(params.runtime)
        dtype = pick_dtype(params.runtime, self.device)
        pipeline = load_pipeline(params.model, dtype, **dict.fromkeys(TEXT_PARTS))
        if adapter is not None:
            pipeline.unet = with_adapter(pipeline.unet, adapter)
        if pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        pipeline.to(self.device)
        if fast and self.device.type == "cuda":
            speed_up(pipeline, compiled=params.runtime.compile)
        self.pipeline, self.unet, self.vae = pipeline, pipeline.unet.eval(), pipeline.vae.eval()
        self.tiles = Tiles() if self.device.type == "cpu" else None
        self.batch_size = params.runtime.batch_size

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Conditioning of `prompts`, with the empty prompt's appended as the last row."""
        tokens, pooled = [], []
        for start in range(0, len(prompts), TEXT_TILE):
            part = list(prompts[start : start + TEXT_TILE])
            padding = [""] * (TEXT_TILE - len(part)) if self.tiles else []
            found, no_tokens, found_pooled, no_pooled = self._text_pipeline.encode_prompt(
                prompt=part + padding, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            tokens.append(found[: len(part)])
            pooled.append(found_pooled[: len(part)])
        return self.as_embeds(torch.cat([*tokens, no_tokens[:1]]), torch.cat([*pooled, no_pooled[:1]]))

    def as_embeds(self, tokens: torch.Tensor, pooled: torch.Tensor) -> PromptEmbeds:
        """Tensors as `encode` made them, on this sampler's device."""
        return PromptEmbeds(tokens.to(self.device), pooled.to(self.device))

    @cached_property
    def _text_pipeline(self) -> StableDiffusionXLPipeline:
        return load_pipeline(self.model, self.unet.dtype, unet=None, vae=None).to(self.device)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """Unit noise, float32 [n, channels, height / 8, width / 8], one CPU generator per seed."""
        factor = self.pipeline.vae_scale_factor
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def denoise(
        self,
        noise: torch.Tensor,
        embeds: PromptEmbeds,
        empty: PromptEmbeds,
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Final latents, float32 [n, channels, h, w] on the CPU, for unit noise of the same shape; see `advance`."""
        steps = range(num_inference_steps)
        return self.advance(noise, embeds, empty, steps, num_inference_steps, guidance_scale)[0]

    @torch.inference_mode()
    def advance(
        self,
        latents: torch.Tensor,
        embeds: PromptEmbeds,
        empty: PromptEmbeds,
        steps: range,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do some of the scheduler's steps.

        Args:
            latents: [n, channels, h, w]: unit noise as from `noise` when the steps start at 0, else the last result.
            embeds: conditioning, one row per image.
            empty: conditioning of the empty prompt, one row; used when guidance_scale > 1.
            steps: which of the `num_inference_steps`. Stopping in between changes nothing if the scheduler keeps
                nothing from step to step.
            guidance_scale: classifier-free guidance (Ho and Salimans, 2022): e_0 + g * (e_c - e_0).

        Returns:
            The latents after the last of `steps`, and the clean latents that the model expected in that step, where
            the scheduler tells them; float32 on the CPU.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents.to(self.device, torch.float32)
        if steps.start == 0:
            latents = latents * scheduler.init_noise_sigma
        elif hasattr(scheduler, "set_begin_index"):  # the others know the step by its timestep
            scheduler.set_begin_index(steps.start)
        count, guided = len(latents), guidance_scale > 1
        tokens, pooled = embeds.tokens, embeds.pooled
        if guided:
            tokens = torch.cat([empty.tokens.expand(count, -1, -1), tokens])
            pooled = torch.cat([empty.pooled.expand(count, -1), pooled])
        time_ids = self.time_ids(latents.shape[-2], latents.shape[-1]).expand(len(tokens), -1)
        for timestep in scheduler.timesteps[steps.start : steps.stop]:
            model_input = scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
            rows = torch.cat([model_input] * 2) if guided else model_input
            predicted = self._unet(rows, timestep, tokens, pooled, time_ids).float()
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            done = scheduler.step(predicted, timestep, latents)
            latents = done.prev_sample
        clean = getattr(done, "pred_original_sample", None)
        return latents.cpu(), None if clean is None else clean.cpu()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [n, height, width, 3] on the CPU, of clean latents [n, channels, h, w]."""
        return torch.cat(
            [self._decode(part) for part in latents.split(DECODER_TILE if self.tiles else DECODED_AT_ONCE)]
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = self._run(DECODER_TILE, lambda x: self.vae.decode(x, return_dict=False)[0], scaled)
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()

    def fitting(self, queue: deque[T], run: Callable[[list[T]], R]) -> tuple[list[T], R]:
        """Take up to `batch_size` items off the queue's left and run them; both are returned.

        When the device's memory does not hold so many, `batch_size` is halved for good.

        Raises:
            torch.OutOfMemoryError: there is not even room for one.
        """
        while True:
            batch = list(islice(queue, self.batch_size))
            try:
                result = run(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                log.warning("out of memory with %d images at once; going on with %d", len(batch), self.batch_size)
                continue
            for _ in batch:
                queue.popleft()
            return batch, result

    def time_ids(self, latent_height: int, latent_width: int) -> torch.Tensor:
        """SDXL's size conditioning [1, 6]: original size, crop corner (0, 0), target size, in pixels."""
        size = [latent_height * self.pipeline.vae_scale_factor, latent_width * self.pipeline.vae_scale_factor]
        return torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.unet.dtype)

    def _unet(self, rows, timestep, tokens, pooled, time_ids) -> torch.Tensor:
        def run(x, tok, pool, ids):
            conditions = {"text_embeds": pool, "time_ids": ids}
            return self.unet(x, timestep, tok, added_cond_kwargs=conditions, return_dict=False)[0]

        return self._run(UNET_TILE, run, rows, tokens, pooled, time_ids)

    def _run(self, tile: int, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return self.tiles.run(tile, function, *tensors) if self.tiles else function(*tensors)


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

    Args:
        embeds: from `Sampler.encode`; its last row is the empty prompt.
        on_images: called with the number of images after each micro-batch.

    Returns:
        Latents float16 [n, channels, h, w], and the pixels decoded from exactly those, uint8 [n, height, width, 3].

    Raises:
        torch.OutOfMemoryError: there is not even room for one image.
    """

    def run(batch: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        final = sampler.denoise(
            sampler.noise([seed for _, seed in batch], height, width),
            embeds[[row for row, _ in batch]],
            embeds[[-1]],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).half()
        return final, sampler.decode(final)

    queue, latents, images = deque(zip(rows, seeds, strict=True)), [], []
    while queue:
        batch, (final, decoded) = sampler.fitting(queue, run)
        latents.append(final)
        images.append(decoded)
        on_images(len(batch))
    return torch.cat(latents), torch.cat(images)
