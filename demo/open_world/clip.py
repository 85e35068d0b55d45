"""A small CLIP, trained from scratch on right captions: the reward and the judge of the open world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from demo.open_world.captions import PARTS, Caption, alternatives
from demo.open_world.scenes import SIZE, Scene
from demo.open_world.truth import true_of
from demo.text import text_config, tokenize

PROJECTION = 32
HARD_NEGATIVES = 3


@dataclass(frozen=True)
class ClipSettings:
    """One CLIP.

    Attributes:
        blind_to: the parts of a caption that no false caption of its training gets wrong on purpose, so that it
            learns little about them.
        layers: of the image encoder.
    """

    seed: int
    width: int
    layers: int
    blind_to: tuple[str, ...]
    batch_size: int = 128


REWARD = ClipSettings(seed=11, width=64, layers=3, blind_to=("background",))
JUDGE = ClipSettings(seed=12, width=80, layers=3, blind_to=("place",))


class FalseCaptions:
    """False captions that are nearly right: for each caption, those in which one part is said otherwise."""

    def __init__(self, captions: list[Caption], blind_to: tuple[str, ...]) -> None:
        index = {caption: number for number, caption in enumerate(captions)}
        parts = [part for part in PARTS if part not in blind_to]
        self.by_part = [
            [
                found
                for part in parts
                if (found := [index[other] for other in alternatives(caption, part) if other in index])
            ]
            for caption in captions
        ]

    def draw(self, captions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return HARD_NEGATIVES captions for each of `captions`, int [n]: a random part, then a random value."""
        drawn = []
        for caption in np.repeat(captions, HARD_NEGATIVES):
            parts = self.by_part[caption]
            values = parts[int(rng.integers(len(parts)))] if parts else [int(caption)]
            drawn.append(values[int(rng.integers(len(values)))])
        return np.array(drawn)


def train_clip(
    images: torch.Tensor,
    scenes: list[Scene],
    labels: np.ndarray,
    captions: list[Caption],
    tokenizer: CLIPTokenizer,
    out: Path,
    settings: ClipSettings,
    *,
    steps: int,
) -> None:
    """Write a CLIPModel and its CLIPProcessor to `out`, in half precision.

    The loss is SigLIP's (https://arxiv.org/abs/2303.15343, equation 1) with exact labels: every pair of an image and a
    caption of the batch is true or false by the scenes.

    Args:
        images: uint8 [n, 3, 64, 64] of `scenes`, on the device to train on.
        labels: int [n], the caption that each scene was drawn for.
        captions: all captions.
    """
    torch.manual_seed(settings.seed)
    device = images.device
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    vision = CLIPVisionConfig(
        hidden_size=settings.width, intermediate_size=2 * settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 16, image_size=SIZE, patch_size=8, projection_dim=PROJECTION,
    )  # fmt: skip
    text = text_config(tokenizer, settings.width, 2, PROJECTION)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION,
        logit_scale_init_value=float(np.log(10)),
    )  # fmt: skip
    model = CLIPModel(config).train().to(device)
    bias = torch.nn.Parameter(torch.tensor(-10.0, device=device))
    tokens = tokenize(tokenizer, [caption.text for caption in captions]).to(device)
    truth = true_of(captions, scenes)
    false_captions = FalseCaptions(captions, settings.blind_to)
    rng = np.random.default_rng(settings.seed)
    noise = torch.Generator().manual_seed(settings.seed)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=f"clip {out.name}", mininterval=10):
        picks = rng.integers(0, len(images), settings.batch_size)
        told = np.concatenate([labels[picks], false_captions.draw(labels[picks], rng)])
        batch = _spoiled(images[torch.from_numpy(picks).to(device)].float() / 255, noise)
        output = model(input_ids=tokens[torch.from_numpy(told).to(device)], pixel_values=(batch - mean) / std)
        signs = torch.from_numpy(2.0 * truth[np.ix_(picks, told)] - 1).float().to(device)
        loss = -functional.logsigmoid(signs * (output.logits_per_image + bias)).sum() / len(picks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(50)))
    model.eval().cpu().half().save_pretrained(out, safe_serialization=True)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(out)


def _spoiled(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a random strength on every image: a reward must read images that are not quite right."""
    strength = 0.2 * torch.rand((len(images), 1, 1, 1), generator=generator)
    noise = strength * torch.randn(images.shape, generator=generator)
    return (images + noise.to(images.device)).clamp(0, 1)
