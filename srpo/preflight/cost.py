"""Estimates of time and disk of a campaign on SDXL: arithmetic over params, without models or devices.

FLOP of one pass were counted with torch's FLOP counter over SDXL's shapes, on the meta device; multiply and add count
as two.

CPU seconds were measured per image of 1024 x 1024 on one core; stages do that work beside the device.

All functions take the params of one round, with its overrides applied (`Params.for_round`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION, GenerateParams, SamplingParams, TrainParams
from srpo.data.prompts import Prompt
from srpo.sampling.sizes import rows_by_size

GB = 1e9
PIXELS = 1024 * 1024
UNET_TFLOP = 6.76  # one forward pass of one row at 1024 x 1024
DECODE_TFLOP = 10.5  # the VAE's decoder at 1024 x 1024
TRAIN_FORWARDS = {"lora": 14 / UNET_TFLOP, "full": 20 / UNET_TFLOP}  # one training pass, in forward passes
TEXT_TFLOP = 0.13  # one forward pass of one text through both text encoders
UNET_WEIGHTS = 2.567e9
LORA_WEIGHTS_PER_RANK = 1.4515e6  # of the default target_modules, attention's four projections
TEXT_LORA_WEIGHTS_PER_RANK = 0.3953e6  # of both text encoders
IMAGE_BYTES = 1.36e6  # lossless WebP of a photograph of 1024 x 1024
LATENT_BYTES = 2 * 4 / 64  # per pixel: four float16 channels for 8 x 8 pixels
# One image through the image encoder at its input size (224 to 336 pixels), by reward family: twice the published MACs.
REWARD_TFLOP = {
    "clip": 0.16, "aesthetic": 0.16, "head": 0.16, "pickscore": 0.33, "hpsv2": 0.33, "hpsv2.1": 0.33,
    "imagereward": 0.25,
}  # fmt: skip
OTHER_REWARD_TFLOP = 25.0  # of vqascore's 11 billion weights; an upper bound for a class of one's own
INCEPTION_TFLOP = 0.012
ENCODE_SECONDS = 0.04  # lossless WebP
DECODE_SECONDS = 0.025  # to a tensor, and the search for images of one color
STATISTICS_SECONDS = 0.016  # saturation, contrast, edges and color entropy
HASH_BYTES_PER_SECOND = 0.5e9  # MD5 by DVC
COPY_BYTES_PER_SECOND = 1e9  # into DVC's cache where it holds copies
# Dense bf16 peaks in TFLOP/s from the manufacturers' data sheets; the first name contained in the device's name counts.
PEAKS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0,
    "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
EXAMPLES = ("H200", "H100", "A100", "RTX 4090")
SHARE = 0.4  # of the bf16 peak that compiled PyTorch is assumed to reach; without compiling, an H200 reached .37
TRAIN_SPEED = 0.45  # an H200 reached .15 to .18 of the peak in training a LoRA with 4 and 8 samples at once


@dataclass(frozen=True)
class Machine:
    """The machine that an estimate is for.

    Attributes:
        peak: one device's dense bf16 peak, TFLOP/s.
        processes: how many run at once, one per device.
        cores: CPU cores.
        share: of the peak that is reached.
    """

    peak: float
    processes: int = 1
    cores: int = 1
    share: float = SHARE


@dataclass(frozen=True)
class StageCost:
    """Work of one stage.

    Attributes:
        tflop: on all devices together.
        cpu_seconds: spent beside the devices, on all cores.
        speed: of a device, compared with sampling.
    """

    tflop: float = 0.0
    cpu_seconds: float = 0.0
    speed: float = 1.0

    def device_seconds(self, machine: Machine) -> float:
        """Return seconds of computation, summed over devices."""
        return self.tflop / (machine.peak * machine.share * self.speed)

    def hours(self, machine: Machine) -> float:
        """Return hours from start to end."""
        return max(self.device_seconds(machine) / machine.processes, self.cpu_seconds / machine.cores) / 3600


@dataclass(frozen=True)
class RoundCost:
    """Work of one round's stages; `save` is DVC's hashing and copying of their outputs, on one core."""

    generate: StageCost
    score: StageCost
    train: StageCost
    evaluate: StageCost
    save_seconds: float

    def stage_hours(self, machine: Machine) -> dict[str, float]:
        """Return hours from start to end by stage."""
        stages = {"generate": self.generate, "score": self.score, "train": self.train, "evaluate": self.evaluate}
        return {name: stage.hours(machine) for name, stage in stages.items()} | {"save": self.save_seconds / 3600}

    def gpu_hours(self, machine: Machine) -> float:
        """Return hours of computation, summed over devices."""
        stages = (self.generate, self.score, self.train, self.evaluate)
        return sum(stage.device_seconds(machine) for stage in stages) / 3600


@dataclass(frozen=True)
class Images:
    """The images that prompts ask for.

    Attributes:
        prompts: number of prompts.
        pixels: of an image, on average.
    """

    prompts: int
    pixels: float = PIXELS

    @classmethod
    def of(cls, prompts: Sequence[Prompt], sampling: SamplingParams) -> Images:
        """Return the images of these prompts, each of its own size."""
        by_size = rows_by_size(prompts, sampling)
        total = sum(size.width * size.height * len(rows) for size, rows in by_size.items())
        return cls(len(prompts), total / max(1, len(prompts)))


def unet_tflop(pixels: float) -> float:
    """Return the work of SDXL's UNet for one row: proportional to pixels, a few percent too much below 1024 x 1024."""
    return UNET_TFLOP * pixels / PIXELS


def image_tflop(steps: float, guidance: float, pixels: float) -> float:
    """Return the work of one image: `steps` passes, with twice the rows if guided, and the decoder."""
    rows = 2 if guidance > 1 else 1
    return steps * rows * unet_tflop(pixels) + DECODE_TFLOP * pixels / PIXELS


def mean_steps(settings: GenerateParams) -> float:
    """Return denoising steps per candidate, with early rejection and its audit."""
    full = settings.num_inference_steps
    early = settings.early_rejection
    if early is None:
        return float(full)
    spent = 0
    done = 0
    alive = settings.candidates_per_prompt
    for checkpoint in early.checkpoints:
        spent += alive * (checkpoint.step - done)
        done = checkpoint.step
        alive = checkpoint.keep
    rejecting = (spent + alive * (full - done)) / settings.candidates_per_prompt
    return early.audit_fraction * full + (1 - early.audit_fraction) * rejecting


def round_cost(params: Params, train: Images, held_out: Images, copies: int = 1) -> RoundCost:
    """Return the work of a round. Previews, text encoders and `srpo select` (about a percent) are left out.

    Args:
        train: of `prompts.train`; a round that draws fewer makes candidates for fewer.
        held_out: of `prompts.eval`.
        copies: 2 if DVC's cache holds copies of the workspace's files, 1 if links.
    """
    generate = params.generate
    candidates = _drawn(generate, train) * generate.candidates_per_prompt
    candidate = image_tflop(mean_steps(generate), generate.guidance_scale, train.pixels)
    if generate.candidates:  # imported, and encoded in a fraction of the time
        candidate = 0.0
    size = train.pixels / PIXELS
    rewards = sum(REWARD_TFLOP.get(spec.kind, OTHER_REWARD_TFLOP) for spec in params.rewards.values())
    saved_bytes = round_bytes(params, train, held_out)
    return RoundCost(
        generate=StageCost(candidates * candidate, candidates * size * ENCODE_SECONDS),
        score=StageCost(candidates * rewards, candidates * size * DECODE_SECONDS),
        train=StageCost(_training_tflop(params, train.pixels), speed=TRAIN_SPEED),
        evaluate=evaluation_cost(params, held_out),
        save_seconds=saved_bytes / HASH_BYTES_PER_SECOND + (copies - 1) * saved_bytes / COPY_BYTES_PER_SECOND,
    )


def evaluation_cost(params: Params, held_out: Images) -> StageCost:
    """Return the work of evaluating a round or base: images at every guidance scale, rewards and metrics."""
    evaluate = params.evaluate
    images = held_out.prompts * evaluate.images_per_prompt
    sweep = sum(
        image_tflop(evaluate.num_inference_steps, guidance, held_out.pixels) for guidance in evaluate.guidance_scales
    )
    metrics = sum(REWARD_TFLOP.get(spec.kind, OTHER_REWARD_TFLOP) for spec in params.rewards.values())
    if evaluate.features == INCEPTION:
        metrics += INCEPTION_TFLOP
    scales = len(evaluate.guidance_scales)
    statistics = STATISTICS_SECONDS * held_out.pixels / PIXELS
    return StageCost(images * (sweep + scales * metrics), images * scales * statistics)


def lora_weights(train: TrainParams) -> float:
    """Return the number of weights of a round's LoRA."""
    return train.rank * (LORA_WEIGHTS_PER_RANK + (TEXT_LORA_WEIGHTS_PER_RANK if train.train_text_encoder else 0))


def round_bytes(params: Params, train: Images, held_out: Images) -> float:
    """Return bytes of a round's outputs: candidates, winners, sample images and the adapter, without DVC's cache."""
    generate = params.generate
    evaluate = params.evaluate
    candidate = train.pixels * (IMAGE_BYTES / PIXELS + LATENT_BYTES)
    images = _drawn(generate, train) * (generate.candidates_per_prompt + params.select.top_fraction)
    samples = min(evaluate.samples, held_out.prompts) * evaluate.images_per_prompt * held_out.pixels
    adapter = 2 * UNET_WEIGHTS if params.train.method == "full" else 4 * lora_weights(params.train)
    return images * candidate + samples * IMAGE_BYTES / PIXELS + adapter


def peak_tflops(device: str) -> float | None:
    """Return a device's dense bf16 peak by its name in torch.cuda and nvidia-smi; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def _drawn(generate: GenerateParams, train: Images) -> int:
    return min(train.prompts, generate.prompts_per_round or train.prompts)


def _training_tflop(params: Params, pixels: float) -> float:
    train = params.train
    forwards = TRAIN_FORWARDS[train.method]
    text = 3 * TEXT_TFLOP if train.train_text_encoder else 0.0  # there and back
    if train.objective != "sft":  # winner and loser, and both through the reference
        forwards = 2 * forwards + 2
        text *= 8 / 3
    return train.steps * train.batch_size * (forwards * unet_tflop(pixels) + text)
