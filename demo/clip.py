"""A small CLIP, trained from scratch on clean captions: the reward and the judge of the tiny world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from demo.scenes import SIZE
from demo.text import text_config, tokenize

PROJECTION = 32


def train_clip(
    images: np.ndarray,
    labels: np.ndarray,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    out: Path,
    *,
    seed: int,
    width: int,
    layers: int,
    steps: int,
    batch_size: int = 128,
) -> None:
    """Write a CLIPModel and its CLIPProcessor to `out`, in half precision.

    Args:
        images: uint8 [n, 64, 64, 3].
        labels: int [n], which of `captions` is true of each image.
        captions: all captions; a batch is contrasted against every one of them.
    """
    torch.manual_seed(seed)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 16,
        image_size=SIZE, patch_size=8, projection_dim=PROJECTION,
    )  # fmt: skip
    text = text_config(tokenizer, width, 2, PROJECTION)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION)
    ).train()
    tokens, rng = tokenize(tokenizer, captions), np.random.default_rng(seed)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=f"clip {out.name}", mininterval=10):
        picks = rng.integers(0, len(images), batch_size)
        batch = _spoiled(torch.from_numpy(images[picks]).permute(0, 3, 1, 2).float() / 255)
        output = model(input_ids=tokens, pixel_values=(batch - mean) / std)
        loss = functional.cross_entropy(output.logits_per_image, torch.from_numpy(labels[picks]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(50)))
    model.eval().half().save_pretrained(out, safe_serialization=True)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(out)


def _spoiled(images: torch.Tensor) -> torch.Tensor:
    """Noise of a random strength on every image: a reward must read images that are not quite right."""
    strength = 0.25 * torch.rand(len(images), 1, 1, 1)
    return (images + strength * torch.randn_like(images)).clamp(0, 1)
