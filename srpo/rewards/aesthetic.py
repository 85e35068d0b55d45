"""LAION's aesthetic predictor v2: the rating that people give to such an image, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from srpo.config.reward_families import CLIP_L_ENCODER, FAMILIES
from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.clip import ClipEncoder
from srpo.rewards.heads import load_head
from srpo.rewards.protocol import Pixels

FAMILY = FAMILIES["aesthetic"]


class AestheticReward:
    """A small MLP on the length-1 image embedding of CLIP ViT-L/14 (Schuhmann, 2022, improved aesthetic predictor).

    Units: mean human rating of 1 to 10; most images get 4 to 7. The prompt is ignored, so it should not be the only
    selecting reward.
    Preprocessing: CLIP's (shortest side to 224 bicubic, center crop, OpenAI's mean and standard deviation).
    Source: `sac+logos+ava1-l14-linearMSE.pth`, of the repository christophschuhmann/improved-aesthetic-predictor;
    the default is a copy on the Hub. License: Apache-2.0.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the MLP, and its CLIP from the same local folder, or from the Hub if that has none.

        Args:
            model: the file (.pth or .safetensors), or a folder or Hub repository that holds it under its published
                name.

        Raises:
            UserError: one of the two can't be loaded, or their sizes differ.
        """
        source = Source(model, revision)
        state = load_state(source, FAMILY.file)
        with loading(source):
            self.head = load_head(state).to(device)
            self.encoder = ClipEncoder.load(
                sibling_or_default(source, "config.json", Source(*CLIP_L_ENCODER[:2])), device, dtype
            )
            if self.head[0].in_features != (width := self.encoder.model.config.projection_dim):
                raise ValueError(f"it takes embeddings of {self.head[0].in_features} numbers, its CLIP makes {width}")

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the rating of image i, float32 [n]; prompts are not read."""
        return self.head(normalize(self.encoder.images(images), dim=-1)).squeeze(1).cpu()

    def features(self, images: Pixels) -> torch.Tensor:
        """Return the projected image embeddings, float32 [n, dim], not normalized."""
        return self.encoder.images(images).cpu()
