"""Converters of published checkpoints to transformers' models: open_clip's CLIP and ImageReward's BLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

# width of one attention head: it can't be read from a checkpoint's shapes, and is the same for all ViT-H-14
CLIP_IMAGE_HEAD = 80
CLIP_TEXT_HEAD = 64
BLIP_HEAD = 64

OPEN_CLIP_NAMES = [
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers spells it so
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def clip_from_open_clip(state: Mapping[str, torch.Tensor]) -> CLIPModel:
    """Return the CLIPModel that computes the same as an open_clip ViT-H-14 checkpoint.

    Sizes are read from the tensors, so a smaller model of the same layout loads too.

    Raises:
        KeyError, ValueError: tensors are missing, or unknown.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in ("text_projection", "visual.proj"):
            target = "text_projection.weight" if name == "text_projection" else "visual_projection.weight"
            renamed[target] = value.T.contiguous()
            continue
        if name == "attn_mask":  # open_clip's causal mask; transformers makes its own
            continue
        for pattern, replacement in OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.in_proj_" in name:
            part = name.rsplit("_", 1)[1]
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(f".attn.in_proj_{part}", f".self_attn.{letter}_proj.{part}")] = third
        else:
            renamed[name] = value
    model, info = CLIPModel.from_pretrained(
        None, config=_clip_config(renamed), state_dict=renamed, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"not an open_clip ViT-H-14 checkpoint; {len(wrong)} tensors don't match, such as {wrong[0]}")
    return model


def _clip_config(state: Mapping[str, torch.Tensor]) -> CLIPConfig:
    patches = state["vision_model.embeddings.patch_embedding.weight"]
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    words = state["text_model.embeddings.token_embedding.weight"]
    projection = state["text_projection.weight"].shape[0]
    vision = _clip_transformer(state, "vision_model", CLIP_IMAGE_HEAD) | {
        "patch_size": patches.shape[-1],
        "image_size": round(positions**0.5) * patches.shape[-1],
        "projection_dim": projection,
    }
    text = _clip_transformer(state, "text_model", CLIP_TEXT_HEAD) | {
        "vocab_size": words.shape[0],
        "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": projection,
        "eos_token_id": 2,  # makes transformers pool at the highest token id, as open_clip does
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _clip_transformer(state: Mapping[str, torch.Tensor], name: str, head: int) -> dict:
    inner, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    layers = {key.split(".")[3] for key in state if key.startswith(f"{name}.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // head,
        "num_hidden_layers": len(layers),
        "hidden_act": "gelu",
    }


BLIP_NAMES = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


def blip_vision(state: Mapping[str, torch.Tensor]) -> BlipVisionModel:
    """Return the image encoder from the tensors below `blip.visual_encoder.`.

    Raises:
        KeyError, RuntimeError: tensors are missing, unknown or of other shapes.
    """
    patch = state["patch_embed.proj.weight"].shape[-1]
    width = state["cls_token"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(state, "blocks."),
        num_attention_heads=width // BLIP_HEAD,
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in BLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    model.load_state_dict(renamed)
    return model


def blip_text(state: Mapping[str, torch.Tensor]) -> BlipTextModel:
    """Return the text encoder from the tensors below `blip.text_encoder.`.

    Raises:
        KeyError, RuntimeError: tensors are missing, unknown or of other shapes.
    """
    words = state["embeddings.word_embeddings.weight"]
    positions = state["embeddings.position_embeddings.weight"]
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(state, "encoder.layer."),
        num_attention_heads=words.shape[1] // BLIP_HEAD,
        max_position_embeddings=positions.shape[0],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        layer_norm_eps=1e-12,
        is_decoder=True,  # adds the cross-attention layers; it is still called as an encoder
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict({name: value for name, value in state.items() if name != "embeddings.position_ids"})
    return model


def below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
