"""Image preprocessing for vision encoders: on tensors, in batches, on the encoder's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import interpolate, pad

from srpo.rewards.protocol import Pixels

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers of resampling filters, as in preprocessor_config.json
INTERPOLATIONS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
CHUNK = 8  # images resized at once: as floats, a whole batch at 1024 x 1024 would take a gigabyte


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop, normalize. Pixels are within 1/255 of PIL's (2/255 where images are enlarged), on every device.

    Attributes:
        size: height and width in pixels.
        resize: `shortest` (that side becomes `size`, the aspect ratio stays), `longest` (likewise, then black padding
            to a square), `exact` (height and width become `size`) or None.
        crop: height and width of the center crop, or None.
        scale: factor of pixel values before `mean` and `std` are applied.
        floor_crop: half of an odd margin is rounded down, as in transformers, not to even, as in torchvision.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["shortest", "longest", "exact"] | None = "shortest"
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    scale: float = 1 / 255
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    floor_crop: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing of transformers' CLIP image processor with this `preprocessor_config.json`.

        Raises:
            ValueError: a setting is not supported.
        """
        resize: Literal["shortest", "exact"]
        if config["resample"] not in INTERPOLATIONS:
            raise ValueError(f"resample {config['resample']} is not supported; use 3, bicubic")
        size = {name: value for name, value in dict(config["size"]).items() if value}
        if size.keys() == {"shortest_edge"}:
            resize = "shortest"
            pixels = (size["shortest_edge"],) * 2
        elif size.keys() == {"height", "width"}:
            resize = "exact"
            pixels = (size["height"], size["width"])
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
            floor_crop=True,
        )

    def __call__(self, images: Pixels, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return `dtype` [n, 3, height, width] on `device`, from uint8 [n, 3, any, any]."""
        pixels = self.pixels(images.to(device)).float()
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean / self.scale) / (std / self.scale)).to(dtype)

    def pixels(self, images: Pixels) -> Pixels:
        """Return the images resized, padded and cropped, still uint8, as PIL would make them."""
        if self.resize is not None:
            target = self._target(*images.shape[-2:])
            images = torch.cat([self._resize(part, target) for part in images.split(CHUNK)])
        if self.resize == "longest":
            images = _center(images, self.size, int)
        return images if self.crop is None else _center(images, self.crop, int if self.floor_crop else round)

    def _resize(self, images: Pixels, target: tuple[int, int]) -> Pixels:
        if images.device.type == "cpu":  # torch has a uint8 kernel that computes what PIL does
            return interpolate(images, target, mode=self.interpolation, antialias=True)
        return self._resize_as_floats(images, target)

    def _resize_as_floats(self, images: Pixels, target: tuple[int, int]) -> Pixels:
        # as in PIL: horizontally, then vertically, rounding in between; rounding once differs by 5/255 from 1024 to 224
        pixels = images.float()
        for size in ((images.shape[-2], target[1]), target):
            if pixels.shape[-2:] != size:
                pixels = interpolate(pixels, size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
        return pixels.to(torch.uint8)

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


def _center(images: Pixels, size: tuple[int, int], halve: Callable[[float], int]) -> Pixels:
    """Crop to the center, or pad with black on all sides."""
    pads: list[int] = []
    for have, want in zip(reversed(images.shape[-2:]), reversed(size), strict=True):
        before = halve((want - have) / 2)
        pads += [before, want - have - before]
    return pad(images, pads)
