"""The published formulas, written out from the papers on bare tensors and PIL: nothing of srpo in here."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear

State = dict[str, torch.Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalized(images: list[np.ndarray]) -> torch.Tensor:
    """float32 [n, 3, height, width] from uint8 [height, width, 3] images."""
    scaled = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def shortest_and_crop(pixels: np.ndarray, side: int, halve=int) -> np.ndarray:
    """PIL bicubic to `side` on the shortest side, then the middle."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if width <= height:
        image = image.resize((side, int(side * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(side * width / height), side), Image.Resampling.BICUBIC)
    left, top = halve((image.width - side) / 2), halve((image.height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def longest_and_pad(pixels: np.ndarray, side: int) -> np.ndarray:
    """PIL bicubic to `side` on the longest side, the rest black, image in the middle."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int, mask=None) -> torch.Tensor:
    """Softmax attention of [n, length, width] by heads `head` wide; `mask` is added to the logits."""
    q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(head)
    logits = logits if mask is None else logits + mask
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def norm(x: torch.Tensor, state: State, name: str, eps: float) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def dense(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def patches(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    size = weight.shape[-1]
    return torch.nn.functional.conv2d(pixels, weight, bias, stride=size).flatten(2).transpose(1, 2)


def _open_clip_blocks(x: torch.Tensor, state: State, prefix: str, head: int, mask=None) -> torch.Tensor:
    for layer in range(2):
        at = f"{prefix}transformer.resblocks.{layer}"
        inner = norm(x, state, f"{at}.ln_1", 1e-5)
        q, k, v = linear(inner, state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"]).chunk(3, dim=-1)
        x = x + dense(attention(q, k, v, head, mask), state, f"{at}.attn.out_proj")
        inner = norm(x, state, f"{at}.ln_2", 1e-5)
        x = x + dense(gelu(dense(inner, state, f"{at}.mlp.c_fc")), state, f"{at}.mlp.c_proj")
    return x


def open_clip_cosine(state: State, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """cosine(image, text) of open_clip's ViT: image pooled at the class token, text at its highest token id."""
    x = patches(pixels, state["visual.conv1.weight"])
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre", 1e-5)
    x = _open_clip_blocks(x, state, "visual.", 80)
    image = norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"]
    causal = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
    y = norm(_open_clip_blocks(y, state, "", 64, causal), state, "ln_final", 1e-5)
    text = y[torch.arange(len(y)), ids.argmax(dim=1)] @ state["text_projection"]
    return torch.cosine_similarity(image, text, dim=-1)


def mlp(x: torch.Tensor, state: State, prefix: str = "") -> torch.Tensor:
    """Five linear layers, nothing between them."""
    for index in (0, 2, 4, 6, 7):
        x = dense(x, state, f"{prefix}layers.{index}")
    return x.squeeze(1)


def image_reward(state: State, pixels: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """BLIP's image-grounded text encoder, its first token through the MLP, standardised."""
    at = "blip.visual_encoder"
    x = patches(pixels, state[f"{at}.patch_embed.proj.weight"], state[f"{at}.patch_embed.proj.bias"])
    x = torch.cat([state[f"{at}.cls_token"].expand(len(x), 1, -1), x], dim=1) + state[f"{at}.pos_embed"]
    for layer in range(2):
        block = f"{at}.blocks.{layer}"
        q, k, v = dense(norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + dense(attention(q, k, v, 64), state, f"{block}.attn.proj")
        inner = norm(x, state, f"{block}.norm2", 1e-6)
        x = x + dense(gelu(dense(inner, state, f"{block}.mlp.fc1")), state, f"{block}.mlp.fc2")
    x = norm(x, state, f"{at}.norm", 1e-6)

    at = "blip.text_encoder"
    y = state[f"{at}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{at}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, state, f"{at}.embeddings.LayerNorm", 1e-12)
    hidden = torch.where(seen[:, None, None, :] > 0, 0.0, -math.inf)
    for layer in range(2):
        block = f"{at}.encoder.layer.{layer}"
        for kind, source, mask in (("attention", None, hidden), ("crossattention", x, None)):
            keys = y if source is None else source
            q = dense(y, state, f"{block}.{kind}.self.query")
            k, v = (dense(keys, state, f"{block}.{kind}.self.{part}") for part in ("key", "value"))
            found = dense(attention(q, k, v, 64, mask), state, f"{block}.{kind}.output.dense")
            y = norm(found + y, state, f"{block}.{kind}.output.LayerNorm", 1e-12)
        inner = dense(gelu(dense(y, state, f"{block}.intermediate.dense")), state, f"{block}.output.dense")
        y = norm(inner + y, state, f"{block}.output.LayerNorm", 1e-12)
    return (mlp(y[:, 0], state, "mlp.") - 0.16717362830052426) / 1.0333394966054072
