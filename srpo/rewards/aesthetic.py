"""LAION's aesthetic predictor v2: how well people rate pictures that look like this one, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.clip_encoder import ClipTower
from srpo.rewards.heads import load_head
from srpo.rewards.protocol import Pixels

FILE = "sac+logos+ava1-l14-linearMSE.pth"
TOWER = Source("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")


class AestheticReward:
    """A small MLP on the length-1 image embedding of CLIP ViT-L/14 (Schuhmann, 2022, improved aesthetic predictor).

    Units: mean human rating of 1 to 10; most pictures get 4 to 7. The prompt is ignored: as the only selecting
    reward it forgets what was asked for.
    Preprocessing: the CLIP's (shortest side to 224 bicubic, centre crop, OpenAI's mean and spread).
    Source: `sac+logos+ava1-l14-linearMSE.pth`, of the repository christophschuhmann/improved-aesthetic-predictor;
    the default is a copy on the Hub. Licence: Apache-2.0.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the MLP, and its CLIP from the same local folder, or from the Hub when that holds none.

        Args:
            model: the file (.pth or .safetensors), or a folder or Hub repository that holds it by its own name.

        Raises:
            UserError: one of the two can't be loaded, or they don't fit each other.
        """
        source = Source(model, revision)
        state = load_state(source, FILE)
        with loading(source):
            self.head = load_head(state).to(device)
            self.tower = ClipTower.load(sibling_or_default(source, "config.json", TOWER), device, dtype)
            if self.head[0].in_features != (width := self.tower.model.config.projection_dim):
                raise ValueError(f"it reads embeddings of {self.head[0].in_features}, its CLIP makes {width}")

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n]: the rating of image i; prompts are not read."""
        return self.head(normalize(self.tower.images(images), dim=-1)).squeeze(1).cpu()

    def features(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim]: the projected image embeddings, not normalised."""
        return self.tower.images(images).cpu()
