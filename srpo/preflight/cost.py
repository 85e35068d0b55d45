"""What a campaign on SDXL will cost: pure arithmetic over params, no model and no device.

FLOP and GB of one pass were counted once by torch's FLOP counter and memory tracker over SDXL's shapes in 16 bits,
without a device. The FLOP are exact (multiply and add are two); kernels, allocators and drivers move memory by a
quarter either way. All of it is for SDXL's UNet of 2.57 billion weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from srpo.config.loader import Params
from srpo.config.schema import GenerateParams

GB = 1e9
PIXELS = 1024 * 1024
UNET_TFLOP = 6.76  # one forward pass of one row at 1024 x 1024
DECODE_TFLOP = 10.5  # the VAE's decoder at 1024 x 1024
TRAIN_FORWARDS = {"lora": 14 / UNET_TFLOP, "full": 20 / UNET_TFLOP}  # a training pass, in forward passes
UNET_WEIGHTS, TEXT_WEIGHTS, VAE_WEIGHTS = 2.567e9, 0.818e9, 0.084e9
LORA_WEIGHTS_A_RANK = 1.4515e6  # of the default target_modules, attention's four projections
OPTIMIZER_BYTES = 16  # a trained weight in float32, its gradient and AdamW's two moments
DENOISE_GB, DECODE_GB = 1.5, 2.4  # a row in the UNet, a picture in the decoder; 16 bits, 1024 x 1024
# activations that wait for a sample's backward pass, without and with recomputing: counted, LoRA's float32 inputs added
TRAIN_GB, CHECKPOINTED_GB = 8.0, 1.5
CONTEXT_GB = 1.5  # the driver's, the kernels' and the allocator's own
PNG_BYTES = 1.5e6  # of a 1024 x 1024 picture
LATENT_BYTES = 2 * 4 / 64  # four float16 channels for 8 x 8 pixels
# Dense bf16 peaks of the makers' data sheets, TFLOP/s; the first name that is part of the device's wins.
PEAKS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0,
    "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
EXAMPLES = ("H200", "H100", "A100", "RTX 4090")
SHARE = 0.4  # of the peak that compiled bf16 PyTorch is assumed to reach; not measured here, 0.3 to 0.5 are usual


@dataclass(frozen=True)
class RoundCost:
    """TFLOP of one round's stages."""

    generate: float
    train: float
    evaluate: float

    @property
    def total(self) -> float:
        return self.generate + self.train + self.evaluate

    def hours(self, peak: float, share: float = SHARE) -> float:
        """GPU-hours on a device of `peak` TFLOP/s."""
        return self.total / (peak * share) / 3600


def unet_tflop(height: int, width: int) -> float:
    """One forward pass of SDXL's UNet for one row, by pixels: a few percent too much below 1024 x 1024."""
    return UNET_TFLOP * height * width / PIXELS


def image_tflop(steps: float, guidance: float, height: int, width: int) -> float:
    """One picture: `steps` passes, twice as many rows when guided, and the decoder."""
    rows = 2 if guidance > 1 else 1
    return steps * rows * unet_tflop(height, width) + DECODE_TFLOP * height * width / PIXELS


def mean_steps(settings: GenerateParams) -> float:
    """Denoising steps per candidate, early rejection and its audit counted."""
    full, early = settings.num_inference_steps, settings.early_rejection
    if early is None:
        return float(full)
    spent, done, alive = 0, 0, settings.candidates_per_prompt
    for point in early.checkpoints:
        spent, done, alive = spent + alive * (point.step - done), point.step, point.keep
    rejecting = (spent + alive * (full - done)) / settings.candidates_per_prompt
    return early.audit_fraction * full + (1 - early.audit_fraction) * rejecting


def round_cost(params: Params, key: str, train_prompts: int, eval_prompts: int) -> RoundCost:
    """TFLOP of round `key`. Previews, reward models and text encoders (about a percent) are left out."""
    resolved = params.for_round(key)
    made, trained, measured = resolved.generate, resolved.train, resolved.evaluate
    candidate = image_tflop(mean_steps(made), made.guidance_scale, made.height, made.width)
    forwards = TRAIN_FORWARDS[trained.method]
    if trained.objective != "sft":  # winner and loser, and both by the frozen reference
        forwards = 2 * forwards + 2
    sweep = sum(
        image_tflop(measured.num_inference_steps, guidance, measured.height, measured.width)
        for guidance in measured.guidance_scales
    )
    return RoundCost(
        generate=train_prompts * made.candidates_per_prompt * candidate,
        train=trained.steps * trained.batch_size * forwards * unet_tflop(made.height, made.width),
        evaluate=eval_prompts * measured.images_per_prompt * sweep,
    )


def sampling_gb(params: Params) -> float:
    """GB of device memory that generate and evaluate take: the weights and the dearer of denoising and decoding."""
    width, scale = _bytes(params), max(params.generate.height * params.generate.width, _eval_pixels(params)) / PIXELS
    vae_width = 4 if params.model.vae is None else width  # SDXL's own VAE is run in float32
    weights = (width * (UNET_WEIGHTS + TEXT_WEIGHTS) + vae_width * VAE_WEIGHTS) / GB
    rows = params.runtime.batch_size * scale
    return CONTEXT_GB + weights + max(rows * 2 * DENOISE_GB * width / 2, rows * DECODE_GB * vae_width / 2)


def training_gb(params: Params, key: str) -> float:
    """GB of device memory that training a round takes."""
    resolved, runtime, width = params.for_round(key), params.runtime, _bytes(params)
    settings = resolved.train
    weights = width * (UNET_WEIGHTS + TEXT_WEIGHTS + VAE_WEIGHTS) / GB
    trained = UNET_WEIGHTS if settings.method == "full" else settings.rank * LORA_WEIGHTS_A_RANK
    share = -(-settings.batch_size // runtime.processes)
    rows = min(runtime.train_batch_size or share, share) * (1 if settings.objective == "sft" else 2)
    kept = CHECKPOINTED_GB if runtime.gradient_checkpointing else TRAIN_GB
    scale = resolved.generate.height * resolved.generate.width / PIXELS
    return CONTEXT_GB + weights + trained * OPTIMIZER_BYTES / GB + rows * kept * scale * width / 2


def round_bytes(params: Params, key: str, train_prompts: int, eval_prompts: int) -> float:
    """Bytes a round leaves: candidates, winners, kept samples and the adapter, DVC's cache not counted."""
    resolved = params.for_round(key)
    made, measured = resolved.generate, resolved.evaluate
    pixels = made.height * made.width
    candidate = pixels * (PNG_BYTES / PIXELS + LATENT_BYTES)
    pictures = train_prompts * (made.candidates_per_prompt + resolved.select.top_fraction)
    samples = min(measured.samples, eval_prompts) * measured.images_per_prompt * _eval_pixels(params)
    adapter = 2 * UNET_WEIGHTS if resolved.train.method == "full" else 4 * resolved.train.rank * LORA_WEIGHTS_A_RANK
    return pictures * candidate + samples * PNG_BYTES / PIXELS + adapter


def peak_tflops(device: str) -> float | None:
    """A device's dense bf16 peak by its name (as torch.cuda and nvidia-smi give it); None for one not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def _eval_pixels(params: Params) -> int:
    return params.evaluate.height * params.evaluate.width


def _bytes(params: Params) -> int:
    return 4 if params.runtime.dtype == "float32" else 2
