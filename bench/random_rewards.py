"""The sdxl preset's reward models at their true sizes with random weights, in their published file formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from bench.random_sdxl import TOKENS, half_precision
from demo.text import make_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Hidden widths, layers and heads of the image and the text encoder, and what both are projected to."""

    image: tuple[int, int, int]
    text: tuple[int, int, int]
    projection: int
    activation: str


CLIP_L = Sizes(image=(1024, 24, 16), text=(768, 12, 12), projection=768, activation="quick_gelu")
CLIP_H = Sizes(image=(1280, 32, 16), text=(1024, 24, 16), projection=1024, activation="gelu")
TINY = Sizes(image=(160, 2, 2), text=(128, 2, 2), projection=24, activation="gelu")
OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def make_clip(sizes: Sizes, device: torch.device) -> CLIPModel:
    """Return a CLIPModel with random weights in half precision, made on the device itself."""

    def transformer(width: int, layers: int, heads: int) -> dict[str, int | str]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": sizes.projection,
            "hidden_act": sizes.activation,
        }

    text = CLIPTextConfig(**transformer(*sizes.text), vocab_size=49408, max_position_embeddings=TOKENS)
    vision = CLIPVisionConfig(**transformer(*sizes.image), image_size=224, patch_size=14)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=sizes.projection)
    with torch.device(device), half_precision():
        return CLIPModel(config)


def save_clip(sizes: Sizes, device: torch.device, folder: Path) -> None:
    """Write a model in transformers' layout, with tokenizer and preprocessing."""
    make_clip(sizes, device).save_pretrained(folder, safe_serialization=True)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    tokenizer = make_tokenizer(["a red circle"], folder / "words")
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def save_hps(sizes: Sizes, device: torch.device, folder: Path) -> None:
    """Write a model as xswu/HPSv2 has it, open_clip's names in a training checkpoint, with a tokenizer."""
    folder.mkdir(parents=True)
    make_tokenizer(["a red circle"], folder / "words").save_pretrained(folder)
    state = open_clip_state(make_clip(sizes, device).state_dict())
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")


def open_clip_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a CLIPModel by open_clip's names."""
    renamed = {}
    for name, value in state.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # with q_proj
        target = name
        for old, new in OPEN_CLIP_NAMES.items():
            target = target.replace(old, new)
        if ".self_attn.q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            target = target.replace(".self_attn.q_proj.", ".attn.in_proj_")
        if name in ("text_projection.weight", "visual_projection.weight"):
            value = value.T.contiguous()
            target = "text_projection" if name == "text_projection.weight" else "visual.proj"
        renamed[target] = value.cpu()
    return renamed
