"""The exact judge of the tiny world, as a reward of srpo: `kind: demo.judge:SceneJudge`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from demo.captions import Caption, parse
from demo.truth import matched, open_attributes, read_image
from srpo.errors import UserError
from srpo.rewards.protocol import Pixels


class SceneJudge:
    """1.0 if the image shows what its prompt says, and nothing else, else 0.0. The mean is prompt accuracy."""

    def __init__(
        self, model: str | None, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Take srpo's arguments; there is nothing to load."""

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return 1.0 for each image that is right, else 0.0: float32 [n].

        Raises:
            UserError: a prompt that is none of the world's captions, or images of another size than 64 x 64.
        """
        pairs = zip(_arrays(images), _captions(prompts), strict=True)
        return torch.tensor([float(matched(caption, read_image(image)) is not None) for image, caption in pairs])

    def attributes(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return what each image shows of what its prompt leaves open: int64 [n, 7], see `open_attributes`.

        Raises:
            UserError: as of `score`.
        """
        pairs = zip(_arrays(images), _captions(prompts), strict=True)
        return torch.tensor([open_attributes(caption, read_image(image)) for image, caption in pairs])


def _captions(prompts: Sequence[str]) -> list[Caption]:
    try:
        return [parse(prompt) for prompt in prompts]
    except ValueError as error:
        raise UserError(f"{error}; this judge reads only its captions") from error


def _arrays(images: Pixels) -> np.ndarray:
    if images.shape[1:] != (3, 64, 64):
        raise UserError(f"images of {images.shape[3]} x {images.shape[2]}; this judge reads images of 64 x 64")
    return images.permute(0, 2, 3, 1).cpu().numpy()
