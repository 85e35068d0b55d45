"""Estimates of a GPU's memory, and the keys with which a round of SDXL fits into it: arithmetic over params.

GB of one pass were counted with torch's memory tracker over SDXL's shapes in 16 bits, on the meta device; they are
within a quarter, because kernels, allocators and drivers differ.

All functions take the params of one round, with its overrides applied (`Params.for_round`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from srpo.config.loader import Params
from srpo.config.schema import SamplingParams
from srpo.preflight.cost import GB, PIXELS, UNET_WEIGHTS, lora_weights
from srpo.sampling.sizes import allowed_sizes

FP8_WEIGHTS = 2.209e9  # of the UNet, in 8 bits with model.fp8
TEXT_WEIGHTS = 0.818e9
VAE_WEIGHTS = 0.084e9
REWARD_WEIGHTS = {
    "clip": 0.43e9, "aesthetic": 0.43e9, "head": 0.43e9, "pickscore": 0.99e9, "hpsv2": 0.99e9, "hpsv2.1": 0.99e9,
    "imagereward": 0.45e9,
}  # fmt: skip
OTHER_REWARD_WEIGHTS = 11e9  # vqascore's; an upper bound for a class of one's own
# per trained weight: float32 weight and gradient, and what the optimizer keeps
OPTIMIZER_BYTES = {"adamw": 16, "adamw_8bit": 10, "paged_adamw_8bit": 10, "adafactor": 8, "prodigy": 24}
CARDS = (8, 12, 16, 24, 48, 80)  # GB
DENOISE_GB = 0.18  # per row in the UNet; 16 bits, 1024 x 1024
DECODE_GB = 2.4  # per image in the decoder; 16 bits, 1024 x 1024
# activations kept for one sample's backward pass, without and with checkpointing: counted, LoRA's float32 inputs added
TRAIN_GB = 8.0
CHECKPOINTED_GB = 1.5
TEXT_TRAIN_GB = 0.27  # in the text encoders, without checkpointing
CONTEXT_GB = 1.5  # of driver, kernels and allocator

Keys = dict[str, int | bool]


def sampling_gb(params: Params, pixels: float = 0) -> float:
    """Return GB of device memory in generate and evaluate. Text encoders have left it when the UNet is loaded.

    Args:
        pixels: of the largest image, where a prompt's line asks for more than the settings do.
    """
    runtime = params.runtime
    width = _bytes_per_number(params)
    vae_width = 4 if params.model.vae is None else width  # SDXL's own VAE runs in float32
    scale = max(pixels, _largest(params.generate), _largest(params.evaluate)) / PIXELS
    unet, text, vae = unet_gb(params), width * TEXT_WEIGHTS / GB, vae_width * VAE_WEIGHTS / GB
    rewards = [
        max(2, 4 * (runtime.dtype == "float32")) * REWARD_WEIGHTS.get(spec.kind, OTHER_REWARD_WEIGHTS) / GB
        for spec in params.rewards.values()
    ]
    on_cpu = runtime.device == "cpu"  # a network of SDXL's size takes row by row there
    rows, decoded = (1, 1) if on_cpu else (2 * runtime.batch_size, min(runtime.batch_size, runtime.vae_batch_size))
    denoising = rows * scale * DENOISE_GB * width / 2
    decoding = decoded * scale * DECODE_GB * vae_width / 2
    if runtime.offload:
        return CONTEXT_GB + max(text, unet + denoising, vae + decoding, *rewards)
    return CONTEXT_GB + max(text, unet + vae + sum(rewards) + max(denoising, decoding))


def training_gb(params: Params, pixels: float = 0) -> float:
    """Return GB of device memory in training; `pixels` as in `sampling_gb`."""
    train = params.train
    runtime = params.runtime
    width = _bytes_per_number(params)
    whole = width * UNET_WEIGHTS / GB  # before the first step; a LoRA is added before the weights are in 8 bits
    text = width * TEXT_WEIGHTS / GB
    loading = whole if runtime.offload else whole + width * VAE_WEIGHTS / GB
    share = -(-train.batch_size // runtime.processes)
    rows = min(runtime.train_batch_size or share, share) * (1 if train.objective == "sft" else 2)
    activations = CHECKPOINTED_GB if runtime.gradient_checkpointing else TRAIN_GB
    unet = unet_gb(params)
    if params.model.fp8 and not runtime.gradient_checkpointing:  # autograd keeps what each layer's weights are cast to
        unet += width * FP8_WEIGHTS / GB
    if train.train_text_encoder:
        unet += text
        loading += text
        activations += 0 if runtime.gradient_checkpointing else TEXT_TRAIN_GB
    trained = UNET_WEIGHTS if train.method == "full" else lora_weights(train)
    scale = max(pixels, _largest(params.generate)) / PIXELS
    training = unet + trained * OPTIMIZER_BYTES[train.optimizer] / GB + rows * activations * scale * width / 2
    return CONTEXT_GB + max(loading, training)


def fitting_keys(params: Params, gb: float, pixels: float = 0) -> Keys | None:
    """Return the keys with which a round fits into a device's memory, the fastest; None if none do.

    They are keys of `runtime`, and `fp8` of `model` if nothing else helps: it changes the base.
    """
    runtime = params.runtime
    full_rows = -(-params.train.batch_size // runtime.processes)
    rows = _halves(min(runtime.train_batch_size or full_rows, full_rows))
    sampling = [
        {"batch_size": images, "vae_batch_size": decoded}
        for images in _halves(runtime.batch_size)
        for decoded in _halves(min(runtime.vae_batch_size, images))
    ]
    training = [
        {"train_batch_size": row, "gradient_checkpointing": checkpointing}
        for checkpointing, row in product((runtime.gradient_checkpointing, True), rows)
    ]

    def first(options: Iterable[Keys], base: Params, need: Callable[[Params, float], float]) -> Keys | None:
        return next((keys for keys in options if need(with_keys(base, keys), pixels) <= gb), None)

    for shared in _shared(params):
        base = with_keys(params, shared)
        found = first(sampling, base, sampling_gb), first(training, base, training_gb)
        if found[0] is not None and found[1] is not None:
            return found[0] | found[1] | shared
    return None


def with_keys(params: Params, keys: Keys) -> Params:
    """Return params with these keys of `runtime`, and `fp8` of `model`."""
    runtime: dict[str, Any] = {name: value for name, value in keys.items() if name != "fp8"}
    model = params.model.model_copy(update={"fp8": keys.get("fp8", params.model.fp8)})
    return params.model_copy(update={"runtime": params.runtime.model_copy(update=runtime), "model": model})


def _shared(params: Params) -> Iterator[Keys]:
    """Yield values of the keys that sampling and training have in common, the fastest first."""
    is_plain = params.train.method == "lora" and not params.train.use_dora
    for fp8 in (params.model.fp8, True) if is_plain else (False,):
        for offload in (params.runtime.offload, True):
            yield {"offload": offload, "fp8": fp8}


def _halves(rows: int) -> list[int]:
    return [rows] if rows == 1 else [rows, *_halves(rows // 2)]


def unet_gb(params: Params) -> float:
    """Return GB of the UNet's weights."""
    width = _bytes_per_number(params)
    return (width * UNET_WEIGHTS - (width - 1) * FP8_WEIGHTS * params.model.fp8) / GB


def _largest(sampling: SamplingParams) -> int:
    return max(size.width * size.height for size in allowed_sizes(sampling))


def _bytes_per_number(params: Params) -> int:
    runtime = params.runtime
    return 4 if runtime.dtype == "float32" or (runtime.dtype == "auto" and runtime.device == "cpu") else 2
