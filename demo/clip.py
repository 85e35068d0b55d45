"""A small CLIP, trained from scratch on right captions: the reward and the judge of the tiny world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from demo.captions import PARTS, Caption, alternatives
from demo.clip_labels import Labels, Reader
from demo.scenes import SIZE, Scene
from demo.text import text_config, tokenize
from demo.truth import true_of

PROJECTION = 96
HARD_NEGATIVES = 3
BATCH_SIZE = 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class ClipSettings:
    """One CLIP.

    Attributes:
        blind_to: the parts of a caption that its training takes for said rightly, whatever the image shows.
        width: of both encoders.
        layers: of the image encoder.
    """

    seed: int
    width: int
    layers: int
    blind_to: tuple[str, ...]


REWARD = ClipSettings(seed=11, width=64, layers=3, blind_to=())
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

    The image encoder first learns to read labels of what is where (`Reader`), then both encoders learn from captions,
    and the labels go on. The loss of captions is SigLIP's (https://arxiv.org/abs/2303.15343, equation 1) with exact
    labels: every pair of an image and a caption of the batch is true or false by the scenes.

    Args:
        images: uint8 [n, 3, 64, 64] of `scenes`, on the device to train on.
        labels: int [n], the caption that each scene was drawn for.
        captions: all captions.
        steps: of each of the two parts.
    """
    torch.manual_seed(settings.seed)
    device = images.device
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    model = CLIPModel(_config(tokenizer, settings)).train().to(device)
    reader, shown = Reader(settings.width).to(device), Labels(scenes, device)
    bias = torch.nn.Parameter(torch.tensor(-10.0, device=device))
    tokens = tokenize(tokenizer, [caption.text for caption in captions]).to(device)
    truth = true_of([replace(caption, **dict.fromkeys(settings.blind_to)) for caption in captions], scenes)
    false_captions = FalseCaptions(captions, settings.blind_to)
    rng = np.random.default_rng(settings.seed)
    noise = torch.Generator().manual_seed(settings.seed)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std)
    )

    def draw() -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        picks = rng.integers(0, len(images), BATCH_SIZE)
        rows = torch.from_numpy(picks).to(device)
        return picks, rows, (_spoiled(images[rows].float() / 255, noise) - mean) / std

    def label_loss() -> torch.Tensor:
        _, rows, pixels = draw()
        return reader.loss(model.vision_model(pixels).last_hidden_state, shown, rows)

    def caption_loss() -> torch.Tensor:
        picks, rows, pixels = draw()
        told = np.concatenate([labels[picks], false_captions.draw(labels[picks], rng)])
        output = model(input_ids=tokens[torch.from_numpy(told).to(device)], pixel_values=pixels)
        signs = torch.from_numpy(2.0 * truth[np.ix_(picks, told)] - 1).float().to(device)
        loss = -functional.logsigmoid(signs * (output.logits_per_image + bias)).sum() / len(picks)
        return loss + reader.loss(output.vision_model_output.last_hidden_state, shown, rows)

    _fit([*model.vision_model.parameters(), *reader.parameters()], label_loss, steps, f"{out.name}: labels")
    _fit([*model.parameters(), *reader.parameters(), bias], caption_loss, steps, f"{out.name}: captions")
    model.eval().cpu().half().save_pretrained(out, safe_serialization=True)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(out)


def _fit(trained: list[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor], steps: int, title: str) -> None:
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for _ in tqdm(range(steps), desc=title, mininterval=10):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _config(tokenizer: CLIPTokenizer, settings: ClipSettings) -> CLIPConfig:
    vision = CLIPVisionConfig(
        hidden_size=settings.width, intermediate_size=2 * settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 16, image_size=SIZE, patch_size=8, projection_dim=PROJECTION,
    )  # fmt: skip
    text = text_config(tokenizer, settings.width, 2, PROJECTION)
    return CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION,
        logit_scale_init_value=float(np.log(10)),
    )  # fmt: skip


def _spoiled(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a random strength on every image: a reward must read images that are not quite right."""
    strength = 0.2 * torch.rand((len(images), 1, 1, 1), generator=generator)
    noise = strength * torch.randn(images.shape, generator=generator)
    return (images + noise.to(images.device)).clamp(0, 1)
