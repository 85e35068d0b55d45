"""All that is measured of one model at one guidance scale, taken in batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from srpo.data.prompts import Prompt
from srpo.errors import UserError
from srpo.evaluation.bootstrap import diversity, mean_interval
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import Moments, frechet_distance
from srpo.evaluation.image_stats import image_stats
from srpo.evaluation.kernel import clip_distance, kernel_distance
from srpo.evaluation.reference import Reference
from srpo.rewards.protocol import Reward


class Observation:
    """Scores, features and looks of pictures; the pictures themselves are not kept.

    Memory is the features': 4 bytes x dim x pictures, 40 MB for 5,000 pictures and 2048 dimensions.
    """

    def __init__(self, rewards: Mapping[str, Reward], extractors: Mapping[str, Extractor], features: str) -> None:
        """Nothing seen yet. `features` names the extractor whose moments make the Frechet distance."""
        self.rewards, self.extractors, self.name = rewards, extractors, features
        self.moments = Moments()
        self.rows: list[dict[str, Any]] = []
        self._features: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
        self._stats: list[dict[str, np.ndarray]] = []

    def add(self, images: torch.Tensor, places: Sequence[tuple[Prompt, int]]) -> None:
        """Take in uint8 [n, 3, height, width] and each picture's prompt and number within the prompt.

        Raises:
            UserError: a score or feature is not finite, so that no mean would be.
        """
        texts = [prompt.prompt for prompt, _ in places]
        scores = {name: _finite(name, reward.score(images, texts)).tolist() for name, reward in self.rewards.items()}
        for i, (prompt, index) in enumerate(places):
            row = {"prompt_id": prompt.id, "prompt": prompt.prompt, "index": index}
            self.rows.append(row | {name: values[i] for name, values in scores.items()})
        for name, extractor in self.extractors.items():
            self._features[name].append(_finite(name, extractor.features(images)).numpy())
        self.moments.add(self._features[self.name][-1])
        self._stats.append(image_stats(images.numpy()))

    def features(self, name: str) -> np.ndarray:
        """float32 [n, dim]: an extractor's features of all pictures, in the order they came."""
        return np.concatenate(self._features[name])

    def measures(self, references: Mapping[str, Reference], clip: str) -> dict[str, float]:
        """A flat record: every reward's mean, FID, KID, CMMD, diversity and the looks.

        What has an interval has `<name>_low` and `<name>_high` beside it; the looks have `<name>_std`, over
        pictures.

        Args:
            references: by extractor.
            clip: the extractor whose features CMMD and diversity use.
        """
        prompts = [row["prompt_id"] for row in self.rows]
        features, embeds = self.features(self.name), self.features(clip)
        found: dict[str, float] = {"images": len(self.rows)}
        for name in self.rewards:
            found |= mean_interval(np.array([row[name] for row in self.rows]), prompts).flat(name)
        found["fid"] = frechet_distance(self.moments.gaussian(), references[self.name].gaussian)
        found |= kernel_distance(features, references[self.name].features, prompts).flat("kid")
        found |= clip_distance(embeds, references[clip].features, prompts).flat("cmmd")
        found |= diversity(embeds, prompts).flat("diversity")
        for name in self._stats[0]:
            values = np.concatenate([batch[name] for batch in self._stats])
            found |= {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}
        return found


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"rewards.{name}: NaN or infinity for an eval picture; what measures must answer for every one")
    return values
