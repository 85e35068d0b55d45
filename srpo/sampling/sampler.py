"""Sampling from SDXL: encode prompts, denoise, decode.

All noise of an image comes from its own CPU generator. On a CPU the networks run batch-invariantly, so that no bit of a
result depends on the batch size; on CUDA the last digits do, because its kernels sum in other orders.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from srpo.config.loader import Params
from srpo.config.schema import SamplingParams
from srpo.models.adapter_files import text_lora_digest
from srpo.models.adapters import apply_lora, with_adapter
from srpo.models.pipeline import TEXT_ENCODERS, TEXT_PARTS, load_pipeline, optimize_for_inference
from srpo.runtime.device import pick_device, pick_dtype
from srpo.runtime.turns import TURNS
from srpo.sampling.batch_invariant import BatchInvariant, tile_rows
from srpo.sampling.conditioning import Conditioning, PromptEmbeds, stacked, time_ids
from srpo.sampling.text_encoding import encode_prompts

log = logging.getLogger(__name__)
# rows that a small network sees at once on a CPU
UNET_ROWS = 64
DECODER_ROWS = 32
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sampler:
    """A base pipeline, with an adapter merged in when one is given.

    Its text encoders and its UNet and VAE are loaded when they are first needed: whoever encodes prompts first and then
    releases the text encoders never has all of them in memory.
    """

    def __init__(self, params: Params, adapter: Path | None = None, *, fast: bool = False) -> None:
        """Choose device and dtype.

        Args:
            params: `model` and `runtime` are used.
            adapter: folder of a LoRA or a UNet in diffusers' layout; a folder without weights, as base's, adds nothing.
            fast: on CUDA, optimize the weights' layout for sampling; training needs it unchanged.
        """
        self.model = params.model
        self.device = pick_device(params.runtime)
        self.dtype = pick_dtype(params.runtime, self.device)
        self.batch_invariant = BatchInvariant() if self.device.type == "cpu" else None
        self.batch_size = params.runtime.batch_size
        self._adapter = adapter
        self._optimized = fast and self.device.type == "cuda"
        self._runtime = params.runtime

    @cached_property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """Return the pipeline without text encoders.

        Raises:
            UserError: the model or the adapter can't be loaded.
        """
        pipeline = load_pipeline(self.model, self.dtype, **dict.fromkeys(TEXT_PARTS))
        fp8 = self.model.fp8 and self._optimized
        if self._adapter is not None:
            pipeline.unet = with_adapter(pipeline.unet, self._adapter, beside=fp8)
        if pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        if self._optimized:
            optimize_for_inference(pipeline, compiled=self._runtime.compile, fp8=fp8)
        return pipeline if self._runtime.offload else pipeline.to(self.device)

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """Return the UNet, with the adapter."""
        return self.pipeline.unet.eval()

    @cached_property
    def vae(self) -> AutoencoderKL:
        """Return the VAE."""
        return self.pipeline.vae.eval()

    @cached_property
    def _unet_rows(self) -> int:
        return tile_rows(self.unet, UNET_ROWS)

    @cached_property
    def _decoder_rows(self) -> int:
        return tile_rows(self.vae, DECODER_ROWS) if self.batch_invariant else self._runtime.vae_batch_size

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return the conditioning of n prompts and, as row n, that of the empty prompt."""
        pipeline = self.text_pipeline
        self._bring(pipeline.text_encoder, pipeline.text_encoder_2)
        embeds = encode_prompts(
            pipeline,
            prompts,
            chunked=self.model.long_prompts == "chunk",
            padded=self.batch_invariant is not None,
        )
        return embeds.to(self.device)

    @cached_property
    def text_pipeline(self) -> StableDiffusionXLPipeline:
        """Return the tokenizers and text encoders, with the adapter's part in them."""
        pipeline = load_pipeline(self.model, self.dtype, unet=None, vae=None)
        if self._adapter and self.text_lora:
            apply_lora({name: getattr(pipeline, name) for name in TEXT_ENCODERS}, self._adapter)
        return pipeline if self._runtime.offload else pipeline.to(self.device)

    @cached_property
    def text_lora(self) -> str | None:
        """Return what names the adapter's change of the text encoders; None if it changes none."""
        return text_lora_digest(self._adapter) if self._adapter else None

    def release_text_encoders(self) -> None:
        """Free the memory of the text encoders; `encode` loads them again."""
        self.__dict__.pop("text_pipeline", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
        """Return unit noise, float32 [n, channels, height / 8, width / 8], one image per CPU generator."""
        factor = self.pipeline.vae_scale_factor
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def denoise(
        self,
        noise: torch.Tensor,
        embeds: Conditioning,
        negative: Conditioning,
        sampling: SamplingParams,
        generators: Sequence[torch.Generator] = (),
    ) -> torch.Tensor:
        """Return the final latents, float32 [n, channels, h, w] on the CPU, for unit noise; see `advance`."""
        return self.advance(noise, embeds, negative, None, sampling, generators)[0]

    @torch.inference_mode()
    def advance(
        self,
        latents: torch.Tensor,
        embeds: Conditioning,
        negative: Conditioning,
        steps: range | None,
        sampling: SamplingParams,
        generators: Sequence[torch.Generator] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do some of the scheduler's steps, as `StableDiffusionXLPipeline.__call__` does them.

        Args:
            latents: [n, channels, h, w]: unit noise as from `noise` when the steps start at 0, else the last result.
            embeds: conditioning, one row per image.
            negative: conditioning of the negative prompts, one row per image or one for all; used when
                guidance_scale > 1.
            steps: indices of the scheduler's timesteps, which may be more than `num_inference_steps`; None does all.
                Stopping in between changes nothing if the scheduler keeps nothing from step to step.
            sampling: `guidance_scale` is that of classifier-free guidance (Ho and Salimans, 2022):
                e_n + g * (e_c - e_n); `guidance_rescale` is phi of Lin et al., 2023, section 3.4.
            generators: one per image, for schedulers that draw noise in every step. Each goes on where `noise` left it.

        Returns:
            The latents after the last of `steps`, and the clean latents that the model predicted in that step, where
            the scheduler returns them; float32 on the CPU.
        """
        self._bring(self.unet)
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(sampling.num_inference_steps, device=self.device)
        options = self.pipeline.prepare_extra_step_kwargs(list(generators) or None, eta=0.0)
        if hasattr(scheduler, "noise_sampler_seed"):  # a Brownian tree per image instead of a generator
            scheduler.noise_sampler_seed = [generator.initial_seed() for generator in generators]
        steps = range(len(scheduler.timesteps)) if steps is None else steps
        if hasattr(scheduler, "set_begin_index"):  # the others find the step by its timestep
            scheduler.set_begin_index(steps.start)
        latents = latents.to(self.device, torch.float32)
        if steps.start == 0:
            latents = latents * scheduler.init_noise_sigma
        guided = sampling.guidance_scale > 1
        tokens, pooled = embeds
        if guided:
            both = [*negative.tokens.expand(len(tokens), -1, -1), *tokens]
            tokens, pooled = stacked(both, torch.cat([negative.pooled.expand_as(pooled), pooled]))
        time_ids = self.time_ids(latents.shape[-2], latents.shape[-1]).expand(len(tokens), -1)
        for timestep in scheduler.timesteps[steps.start : steps.stop]:
            model_input = scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
            rows = torch.cat([model_input] * 2) if guided else model_input
            predicted = self._unet(rows, timestep, tokens, pooled, time_ids).float()
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + sampling.guidance_scale * (conditional - unconditional)
                if sampling.guidance_rescale > 0:
                    predicted = rescale_noise_cfg(predicted, conditional, sampling.guidance_rescale)
            output = scheduler.step(predicted, timestep, latents, **options)
            latents = output.prev_sample
        clean = getattr(output, "pred_original_sample", None)
        return latents.cpu(), None if clean is None else clean.cpu()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return uint8 pixels [n, height, width, 3] on the CPU, from clean latents [n, channels, h, w]."""
        self._bring(self.vae)
        return torch.cat([self._decode(part) for part in latents.split(self._decoder_rows)])

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        latents = latents.to(self.device, self.vae.dtype)
        if config.latents_mean is not None and config.latents_std is not None:
            mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            std = latents.new_tensor(config.latents_std).view(1, -1, 1, 1)
            scaled = latents * std / config.scaling_factor + mean
        else:
            scaled = latents / config.scaling_factor
        images = self._run(self._decoder_rows, lambda x: self.vae.decode(x, return_dict=False)[0], scaled)
        images = (images.float() / 2 + 0.5).clamp(0, 1) * 255
        return images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()

    def run_with_oom_backoff(
        self, queue: deque[Item], run: Callable[[list[Item]], Result]
    ) -> tuple[list[Item], Result]:
        """Take up to `batch_size` items off the left of the queue, run them, and return both.

        When the device is out of memory, `batch_size` is halved for good.

        Raises:
            torch.OutOfMemoryError: there is not even memory for one item.
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
        """Return SDXL's size conditioning [1, 6] of latents of this size."""
        factor = self.pipeline.vae_scale_factor
        return time_ids(latent_height * factor, latent_width * factor, self.device, self.unet.dtype)

    def _bring(self, *networks: torch.nn.Module) -> None:
        if self._runtime.offload:
            TURNS.bring(networks, self.device)

    def _unet(self, latents: torch.Tensor, timestep: Any, *conditioning: torch.Tensor) -> torch.Tensor:
        """Return the UNet's prediction; `conditioning` is tokens, pooled and time ids, a row per row of latents."""

        def predict(
            latents: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, time_ids: torch.Tensor
        ) -> torch.Tensor:
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            return self.unet(latents, timestep, tokens, added_cond_kwargs=conditions, return_dict=False)[0]

        return self._run(self._unet_rows, predict, latents, *conditioning)

    def _run(self, tile: int, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return self.batch_invariant.run(tile, function, *tensors) if self.batch_invariant else function(*tensors)


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return one CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_images(
    sampler: Sampler,
    embeds: PromptEmbeds,
    rows: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingParams,
    on_images: Callable[[int], Any] = lambda count: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all latents and images of `sample_batches`, in the order of `rows`, each in one tensor.

    Args:
        on_images: called with the number of images after each micro-batch.
    """
    order: list[int] = []
    latents = []
    images = []
    for numbers, final, decoded in sample_batches(sampler, embeds, rows, seeds, sampling):
        order += numbers
        latents.append(final)
        images.append(decoded)
        on_images(len(numbers))
    back = torch.tensor(order).argsort()
    return torch.cat(latents)[back], torch.cat(images)[back]


def sample_batches(
    sampler: Sampler, embeds: PromptEmbeds, rows: Sequence[int], seeds: Sequence[int], sampling: SamplingParams
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Sample image i from `embeds` row `rows[i]` and seed `seeds[i]`; prompts and candidates mix in a batch.

    Args:
        embeds: from `prompt_embeds` or `Sampler.encode`; a batch has conditioning of one length.
        sampling: steps, guidance and size; its `negative_prompt` is not read, `embeds` holds the negative prompts.

    Yields:
        For every micro-batch the numbers i of its images, latents float16 [n, channels, h, w], and the pixels decoded
        from exactly those, uint8 [n, height, width, 3].

    Raises:
        torch.OutOfMemoryError: there is not even memory for one image.
    """

    def run(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        of_batch = [rows[i] for i in batch]
        generators = seeded(seeds[i] for i in batch)
        noise = sampler.noise(generators, sampling.height, sampling.width)
        final = sampler.denoise(noise, embeds[of_batch], embeds.negative(of_batch), sampling, generators).half()
        return final, sampler.decode(final)

    for group in embeds.groups(rows):
        queue = deque(group)
        while queue:
            batch, (final, decoded) = sampler.run_with_oom_backoff(queue, run)
            yield batch, final, decoded
