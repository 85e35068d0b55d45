"""A linear head on CLIP's features, fitted to what people picked and voted for (`srpo fit-reward`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from srpo.config.reward_families import FAMILIES
from srpo.models.hub import Source, load_state, loading
from srpo.rewards.clip import ClipEncoder
from srpo.rewards.protocol import Pixels
from srpo.storage.json_files import read_json

CLIP_FOLDER = "clip"
RECORD = "head.json"


class FittedHead:
    """weight . (f - mean), where f is the length-1 image embedding followed by its product with the text's.

    Units: log odds; the difference of two images of one prompt is the log odds of people preferring the first.
    Preprocessing: the CLIP's own.
    Source: a folder that `srpo fit-reward` wrote. License: the CLIP's.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the head, and its CLIP from the same folder or, if it came from the Hub, from there.

        Raises:
            UserError: one of the two can't be loaded, or their sizes differ.
        """
        folder = Path(model)
        source = Source(model, revision)
        state = load_state(source, FAMILIES["head"].file)
        clip = Source(str(folder / CLIP_FOLDER), None)
        if not (folder / CLIP_FOLDER).is_dir():
            clip = Source(**read_json(folder / RECORD)["clip"])
        with loading(source):
            self.weight, self.mean = state["weight"].to(device), state["mean"].to(device)
            self.encoder = ClipEncoder.load(clip, device, dtype)
            if len(self.weight) != 2 * (width := self.encoder.model.config.projection_dim):
                raise ValueError(f"it takes {len(self.weight)} features, its CLIP makes {2 * width}")

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the log odds of image i for prompt i, up to a constant per prompt, float32 [n]."""
        return ((head_features(self.encoder, images, prompts) - self.mean) @ self.weight).cpu()

    def prepare(self, batches: Iterable[Sequence[str]]) -> None:
        """Embed the prompts of these batches, of which the images will be scored in any order."""
        self.encoder.prepare(batches)

    def features(self, images: Pixels) -> torch.Tensor:
        """Return the projected image embeddings, float32 [n, dim], not normalized."""
        return self.encoder.images(images).cpu()


def head_features(encoder: ClipEncoder, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
    """Return the features of image i and prompt i, float32 [n, 2 dim] on the encoder's device.

    The sum of the second half is the cosine of image and text.
    """
    image = normalize(encoder.images(images), dim=-1)
    return torch.cat([image, image * encoder.texts(prompts)], dim=1)
