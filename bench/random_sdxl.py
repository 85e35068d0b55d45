"""SDXL 1.0's true configuration with random weights, made where no download is to be had; and a tiny one.

The numbers are those of stabilityai/stable-diffusion-xl-base-1.0's config files. Speed and memory do not depend on the
weights' values, so nothing needs to be downloaded to measure them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.base import make_scheduler
from demo.text import make_tokenizer

TOKENS = 77
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
SHARED_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
SHARED_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}


@dataclass(frozen=True)
class Configuration:
    """What the four networks are built from, and the side of a picture in pixels."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]
    size: int


SDXL = Configuration(
    unet=SHARED_UNET
    | {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=SHARED_VAE | {"sample_size": 1024, "block_out_channels": (128, 256, 512, 512), "force_upcast": True},
    text={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    size=1024,
)
SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = Configuration(
    unet=SHARED_UNET
    | {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    vae=SHARED_VAE
    | {"sample_size": 64, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "force_upcast": False},
    text=SMALL_TEXT | {"projection_dim": 16},
    text_2=SMALL_TEXT | {"projection_dim": 16},
    size=64,
)


def build_networks(
    configuration: Configuration, device: torch.device | str, only: Sequence[str] | None = None
) -> dict[str, torch.nn.Module]:
    """unet, vae, text_encoder and text_encoder_2, or some of them, in torch's default dtype.

    They are made on the device itself; `meta` makes no weights.
    """
    first, second = (
        CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        for _ in range(2)
    )
    first.update(configuration.text)
    second.update(configuration.text_2)
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "unet": lambda: UNet2DConditionModel(**configuration.unet),
        "vae": lambda: AutoencoderKL(**configuration.vae),
        "text_encoder": lambda: CLIPTextModel(first),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(second),
    }
    with torch.device(device):
        return {name: make() for name, make in makers.items() if only is None or name in only}


def save_pipeline(configuration: Configuration, device: torch.device, folder: Path) -> None:
    """The pipeline with random weights in diffusers' layout, float16 (7 GB for SDXL), with one network in memory."""
    torch.manual_seed(0)
    make_tokenizer(["a red circle"], folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=TOKENS)
    others = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "scheduler": make_scheduler()}
    outline = StableDiffusionXLPipeline(**build_networks(configuration, "meta"), **others, add_watermarker=False)
    outline.save_config(folder)
    for name, part in others.items():
        part.save_pretrained(folder / name)
    for name in NETWORKS:
        with half_precision():
            (network,) = build_networks(configuration, device, [name]).values()
        network.save_pretrained(folder / name, safe_serialization=True)


@contextmanager
def half_precision() -> Iterator[None]:
    """Make networks in float16 inside a `with` block: float32 ones take twice the memory before they are cast."""
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def unet_flops(configuration: Configuration) -> int:
    """Operations of one UNet forward pass for one picture (a multiplication and an addition are two), counted."""
    unet = build_networks(configuration, "meta")["unet"].eval()
    settings, side = configuration.unet, configuration.size // 8
    pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        conditions = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        tokens = torch.empty(1, TOKENS, settings["cross_attention_dim"])
        unet(torch.empty(1, 4, side, side), torch.empty(1), tokens, added_cond_kwargs=conditions)
    return counter.get_total_flops()
