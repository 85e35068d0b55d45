"""Pictures to what a vision tower reads: on tensors, in one batch, on the device that will read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from srpo.rewards.base import Pixels

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's resampling numbers, as preprocessor_config.json gives them
INTERPOLATIONS = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop, scale to mean and spread. Pixels come out within 1/255 of what PIL makes of the same picture.

    `resize` is `shortest` (that side becomes `size`, the shape stays), `longest` (likewise, then black padding
    to a square), `exact` (height and width become `size`) or None.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["shortest", "longest", "exact"] | None = "shortest"
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    scale: float = 1 / 255
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """The same as transformers' CLIP image processor does with this `preprocessor_config.json`.

        Raises:
            ValueError: it asks for something that is not known here.
        """
        if config["resample"] not in INTERPOLATIONS:
            raise ValueError(f"resample {config['resample']} is not supported; use 3, bicubic")
        size = {name: value for name, value in dict(config["size"]).items() if value}
        if size.keys() == {"shortest_edge"}:
            resize, pixels = "shortest", (size["shortest_edge"],) * 2
        elif size.keys() == {"height", "width"}:
            resize, pixels = "exact", (size["height"], size["width"])
        else:
            raise ValueError(f"size {size} is not supported; use shortest_edge, or height and width")
        crop = dict(config["crop_size"])
        return cls(
            size=pixels,
            resize=resize if config["do_resize"] else None,
            crop=(crop["height"], crop["width"]) if config["do_center_crop"] else None,
            mean=tuple(config["image_mean"]) if config["do_normalize"] else (0.0,) * 3,
            std=tuple(config["image_std"]) if config["do_normalize"] else (1.0,) * 3,
            scale=config["rescale_factor"] if config["do_rescale"] else 1.0,
            interpolation=INTERPOLATIONS[config["resample"]],
        )

    def __call__(self, images: Pixels, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`dtype` [n, 3, height, width] on `device`, from uint8 [n, 3, any, any]."""
        pixels = self.pixels(images.to(device)).float()
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean / self.scale) / (std / self.scale)).to(dtype)

    def pixels(self, images: Pixels) -> Pixels:
        """Resized, padded and cropped, still uint8, as the PIL chain would leave it before normalising."""
        height, width = images.shape[-2:]
        if self.resize is not None:
            target = self._target(height, width)
            if target != (height, width):
                # without antialias, 1024 to 224 is off by 10/255 and every score is silently wrong
                images = F.resize(images, list(target), interpolation=self.interpolation, antialias=True)
            if self.resize == "longest":
                down, right = self.size[0] - target[0], self.size[1] - target[1]
                images = F.pad(images, [right // 2, down // 2, right - right // 2, down - down // 2])
        return images if self.crop is None else F.center_crop(images, list(self.crop))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.resize == "exact":
            return self.size
        if self.resize == "longest":
            scale = self.size[0] / max(height, width)
            return round(height * scale), round(width * scale)
        short = self.size[0]
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short
