"""HPSv2 and HPSv2.1: CLIP-H fine-tuned on human preferences, from their open_clip checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.clip_encoder import ClipTower
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels

TOKENIZER = Source("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
# width of one attention head: it can't be read from a checkpoint's shapes, and is the same for all ViT-H-14
IMAGE_HEAD, TEXT_HEAD = 80, 64


class HpsV2:
    """cosine(image, text) (Wu et al., 2023, Human Preference Score v2).

    Units: a cosine; 0.25 to 0.30 for most pictures, 0.01 apart is a clear preference (the paper's tables show it
    times 100). Preprocessing: longest side to 224 bicubic, black padding to a square, OpenAI's mean and spread:
    nothing is cropped away. Source: `xswu/HPSv2`, file HPS_v2_compressed.pt. Licence: Apache-2.0.
    """

    FILE = "HPS_v2_compressed.pt"

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the checkpoint, and its tokenizer from the same local folder, or from the Hub when that holds none.

        Args:
            model: the .pt file, or a folder or Hub repository that holds it by its own name.

        Raises:
            UserError: one of the two can't be loaded.
        """
        source = Source(model, revision)
        state = load_state(source, self.FILE)
        with loading(source):
            clip = clip_from_open_clip(state.get("state_dict", state))
        words = sibling_or_default(source, "tokenizer_config.json", TOKENIZER)
        with loading(words):
            tokenizer = AutoTokenizer.from_pretrained(words.model, revision=words.revision, trust_remote_code=False)
        side = (clip.config.vision_config.image_size,) * 2
        self.tower = ClipTower(clip, tokenizer, Preprocess(side, "longest", crop=None), device, dtype)

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n]: cosine of image i and prompt i."""
        return self.tower.cosine(images, prompts)

    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim]: the projected image embeddings, not normalised."""
        return self.tower.images(images).cpu()


class HpsV21(HpsV2):
    """HPSv2.1: as HPSv2, trained on more and better data.

    Units: a cosine; 0.24 to 0.33 for most pictures: a wider range than HPSv2's. Preprocessing and licence are
    HPSv2's. Source: `xswu/HPSv2`, file HPS_v2.1_compressed.pt.
    """

    FILE = "HPS_v2.1_compressed.pt"


RENAMED = [
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
    """The CLIPModel of an open_clip ViT-H-14 checkpoint: the same function in transformers' names.

    Sizes are read from the tensors, so a smaller model of the same layout loads too.

    Raises:
        KeyError, ValueError: tensors are missing, or there are others.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in ("text_projection", "visual.proj"):
            target = "text_projection.weight" if name == "text_projection" else "visual_projection.weight"
            renamed[target] = value.T.contiguous()
            continue
        if name == "attn_mask":  # open_clip's causal mask; transformers makes its own
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".attn.in_proj_" in name:
            part = name.rsplit("_", 1)[1]
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(f".attn.in_proj_{part}", f".self_attn.{letter}_proj.{part}")] = third
        else:
            renamed[name] = value
    model, info = CLIPModel.from_pretrained(None, config=_config(renamed), state_dict=renamed, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"not an open_clip ViT-H-14 checkpoint; {len(wrong)} tensors don't fit, such as {wrong[0]}")
    return model


def _config(state: Mapping[str, torch.Tensor]) -> CLIPConfig:
    patches = state["vision_model.embeddings.patch_embedding.weight"]
    places = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    words = state["text_model.embeddings.token_embedding.weight"]
    projection = state["text_projection.weight"].shape[0]
    vision = _transformer(state, "vision_model", IMAGE_HEAD) | {
        "patch_size": patches.shape[-1],
        "image_size": round(places**0.5) * patches.shape[-1],
        "projection_dim": projection,
    }
    text = _transformer(state, "text_model", TEXT_HEAD) | {
        "vocab_size": words.shape[0],
        "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": projection,
        "eos_token_id": 2,  # makes transformers pool at the highest token id, as open_clip does
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def _transformer(state: Mapping[str, torch.Tensor], name: str, head: int) -> dict:
    inner, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    layers = {key.split(".")[3] for key in state if key.startswith(f"{name}.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // head,
        "num_hidden_layers": len(layers),
        "hidden_act": "gelu",
    }
