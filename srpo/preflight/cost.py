"""Estimates of time, memory and disk of a campaign on SDXL: arithmetic over params, without models or devices.

FLOP and GB of one pass were counted with torch's FLOP counter and memory tracker over SDXL's shapes in 16 bits, on the
meta device. FLOP are exact (multiply and add count as two); memory is within a quarter, because kernels, allocators
and drivers differ. Everything is for SDXL's UNet of 2.57 billion weights.

CPU seconds were measured per image of 1024 x 1024 on one core; stages do that work beside the device.

All functions take the params of one round, with its overrides applied (`Params.for_round`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION, GenerateParams

GB = 1e9
PIXELS = 1024 * 1024
UNET_TFLOP = 6.76  # one forward pass of one row at 1024 x 1024
DECODE_TFLOP = 10.5  # the VAE's decoder at 1024 x 1024
TRAIN_FORWARDS = {"lora": 14 / UNET_TFLOP, "full": 20 / UNET_TFLOP}  # one training pass, in forward passes
UNET_WEIGHTS = 2.567e9
TEXT_WEIGHTS = 0.818e9
VAE_WEIGHTS = 0.084e9
LORA_WEIGHTS_PER_RANK = 1.4515e6  # of the default target_modules, attention's four projections
# per trained weight: float32 weight and gradient, and what the optimizer keeps
OPTIMIZER_BYTES = {"adamw": 16, "adamw_8bit": 10, "paged_adamw_8bit": 10, "adafactor": 8, "prodigy": 24}
DECODER_ROWS = 8  # images that the decoder takes at once
CARDS = (8, 12, 16, 24, 48, 80)  # GB
DENOISE_GB = 0.18  # per row in the UNet; 16 bits, 1024 x 1024
DECODE_GB = 2.4  # per image in the decoder; 16 bits, 1024 x 1024
# activations kept for one sample's backward pass, without and with checkpointing: counted, LoRA's float32 inputs added
TRAIN_GB = 8.0
CHECKPOINTED_GB = 1.5
CONTEXT_GB = 1.5  # of driver, kernels and allocator
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


def unet_tflop(height: int, width: int) -> float:
    """Return the work of SDXL's UNet for one row: proportional to pixels, a few percent too much below 1024 x 1024."""
    return UNET_TFLOP * height * width / PIXELS


def image_tflop(steps: float, guidance: float, height: int, width: int) -> float:
    """Return the work of one image: `steps` passes, with twice the rows if guided, and the decoder."""
    rows = 2 if guidance > 1 else 1
    return steps * rows * unet_tflop(height, width) + DECODE_TFLOP * height * width / PIXELS


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


def round_cost(params: Params, train_prompts: int, eval_prompts: int, copies: int = 1) -> RoundCost:
    """Return the work of a round. Previews, text encoders and `srpo select` (about a percent) are left out.

    Args:
        train_prompts: number in `prompts.train`; a round that draws fewer makes candidates for fewer.
        copies: 2 if DVC's cache holds copies of the workspace's files, 1 if links.
    """
    generate = params.generate
    candidates = _drawn(generate, train_prompts) * generate.candidates_per_prompt
    candidate = image_tflop(mean_steps(generate), generate.guidance_scale, generate.height, generate.width)
    if generate.candidates:  # imported, and encoded in a fraction of the time
        candidate = 0.0
    size = generate.height * generate.width / PIXELS
    rewards = sum(REWARD_TFLOP.get(spec.kind, OTHER_REWARD_TFLOP) for spec in params.rewards.values())
    saved_bytes = round_bytes(params, train_prompts, eval_prompts)
    return RoundCost(
        generate=StageCost(candidates * candidate, candidates * size * ENCODE_SECONDS),
        score=StageCost(candidates * rewards, candidates * size * DECODE_SECONDS),
        train=StageCost(_training_tflop(params), speed=TRAIN_SPEED),
        evaluate=evaluation_cost(params, eval_prompts),
        save_seconds=saved_bytes / HASH_BYTES_PER_SECOND + (copies - 1) * saved_bytes / COPY_BYTES_PER_SECOND,
    )


def evaluation_cost(params: Params, eval_prompts: int) -> StageCost:
    """Return the work of evaluating a round or base: images at every guidance scale, rewards and metrics."""
    evaluate = params.evaluate
    images = eval_prompts * evaluate.images_per_prompt
    sweep = sum(
        image_tflop(evaluate.num_inference_steps, guidance, evaluate.height, evaluate.width)
        for guidance in evaluate.guidance_scales
    )
    metrics = sum(REWARD_TFLOP.get(spec.kind, OTHER_REWARD_TFLOP) for spec in params.rewards.values())
    if evaluate.features == INCEPTION:
        metrics += INCEPTION_TFLOP
    scales = len(evaluate.guidance_scales)
    statistics = STATISTICS_SECONDS * _eval_pixels(params) / PIXELS
    return StageCost(images * (sweep + scales * metrics), images * scales * statistics)


def sampling_gb(params: Params) -> float:
    """Return GB of device memory in generate and evaluate: UNet, VAE, and the larger of denoising and decoding.

    Text encoders have left memory when the UNet is loaded.
    """
    width = _bytes_per_number(params)
    scale = max(params.generate.height * params.generate.width, _eval_pixels(params)) / PIXELS
    vae_width = 4 if params.model.vae is None else width  # SDXL's own VAE runs in float32
    weights = (width * UNET_WEIGHTS + vae_width * VAE_WEIGHTS) / GB
    at_once = 1 if params.runtime.device == "cpu" else params.runtime.batch_size
    rows = at_once * (1 if params.runtime.device == "cpu" else 2)
    decoded = min(at_once, DECODER_ROWS)
    work = max(rows * DENOISE_GB * width, decoded * DECODE_GB * vae_width) / 2
    return CONTEXT_GB + weights + scale * work


def training_gb(params: Params) -> float:
    """Return GB of device memory in training."""
    train = params.train
    runtime = params.runtime
    width = _bytes_per_number(params)
    weights = width * (UNET_WEIGHTS + (TEXT_WEIGHTS if train.train_text_encoder else 0)) / GB
    trained = UNET_WEIGHTS if train.method == "full" else train.rank * LORA_WEIGHTS_PER_RANK
    share = -(-train.batch_size // runtime.processes)
    rows = min(runtime.train_batch_size or share, share) * (1 if train.objective == "sft" else 2)
    activations = CHECKPOINTED_GB if runtime.gradient_checkpointing else TRAIN_GB
    scale = params.generate.height * params.generate.width / PIXELS
    training = trained * OPTIMIZER_BYTES[train.optimizer] / GB + rows * activations * scale * width / 2
    return CONTEXT_GB + weights + training


def fitting_keys(params: Params, gb: float) -> dict[str, int | bool] | None:
    """Return the keys of `runtime` with which a round fits into a device's memory, the fastest; None if none do."""
    runtime = params.runtime
    share = -(-params.train.batch_size // runtime.processes)
    sampling = ({"batch_size": rows} for rows in _halves(runtime.batch_size))
    training = (
        {"train_batch_size": rows, "gradient_checkpointing": checkpointing}
        for checkpointing in (runtime.gradient_checkpointing, True)
        for rows in _halves(min(runtime.train_batch_size or share, share))
    )

    def first(options: Iterable[dict[str, int]], need: Callable[[Params], float]) -> dict[str, int] | None:
        return next((keys for keys in options if need(_with_runtime(params, keys)) <= gb), None)

    fitting = first(sampling, sampling_gb), first(training, training_gb)
    return None if fitting[0] is None or fitting[1] is None else fitting[0] | fitting[1]


def _halves(rows: int) -> list[int]:
    return [rows] if rows == 1 else [rows, *_halves(rows // 2)]


def _with_runtime(params: Params, keys: dict[str, int]) -> Params:
    return params.model_copy(update={"runtime": params.runtime.model_copy(update=keys)})


def round_bytes(params: Params, train_prompts: int, eval_prompts: int) -> float:
    """Return bytes of a round's outputs: candidates, winners, sample images and the adapter, without DVC's cache."""
    generate = params.generate
    evaluate = params.evaluate
    candidate = generate.height * generate.width * (IMAGE_BYTES / PIXELS + LATENT_BYTES)
    images = _drawn(generate, train_prompts) * (generate.candidates_per_prompt + params.select.top_fraction)
    samples = min(evaluate.samples, eval_prompts) * evaluate.images_per_prompt * _eval_pixels(params)
    adapter = 2 * UNET_WEIGHTS if params.train.method == "full" else 4 * params.train.rank * LORA_WEIGHTS_PER_RANK
    return images * candidate + samples * IMAGE_BYTES / PIXELS + adapter


def peak_tflops(device: str) -> float | None:
    """Return a device's dense bf16 peak by its name in torch.cuda and nvidia-smi; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def _drawn(generate: GenerateParams, train_prompts: int) -> int:
    return min(train_prompts, generate.prompts_per_round or train_prompts)


def _training_tflop(params: Params) -> float:
    train = params.train
    forwards = TRAIN_FORWARDS[train.method]
    if train.objective != "sft":  # winner and loser, and both through the reference
        forwards = 2 * forwards + 2
    return train.steps * train.batch_size * forwards * unet_tflop(params.generate.height, params.generate.width)


def _eval_pixels(params: Params) -> int:
    return params.evaluate.height * params.evaluate.width


def _bytes_per_number(params: Params) -> int:
    runtime = params.runtime
    return 4 if runtime.dtype == "float32" or (runtime.dtype == "auto" and runtime.device == "cpu") else 2
