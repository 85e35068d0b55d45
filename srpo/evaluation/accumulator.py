"""All metrics of one model at one guidance scale, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from srpo.data.metric_keys import IMAGE_STATS
from srpo.errors import UserError
from srpo.evaluation.features import Extractor
from srpo.evaluation.image_stats import image_stats
from srpo.evaluation.metrics import (
    ClipDistance,
    Diversity,
    FrechetDistance,
    ImageStatistics,
    KernelDistance,
    MeanScore,
)
from srpo.evaluation.reference import Reference
from srpo.rewards.batches import score_batch
from srpo.rewards.protocol import Pixels, Reward


class Measurements(NamedTuple):
    """The measured values of n images.

    Attributes:
        scores: float32 [n] by reward.
        features: float32 [n, dim] by extractor.
        stats: float64 [n] by image statistic.
    """

    scores: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]
    stats: dict[str, torch.Tensor]


def measure(
    images: Pixels, prompts: Sequence[str], rewards: Mapping[str, Reward], extractors: Mapping[str, Extractor]
) -> Measurements:
    """Measure uint8 [n, 3, height, width].

    Raises:
        UserError: a score or feature is NaN or infinite, so no mean can be computed.
    """
    scores = score_batch(rewards, images, prompts)
    features = {name: extractor.features(images) for name, extractor in extractors.items()}
    for name, values in (*scores.items(), *features.items()):
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"rewards.{name}: NaN or infinity for an evaluation image; every image needs a finite value"
            )
    stats = {name: torch.from_numpy(values) for name, values in image_stats(images.numpy()).items()}
    return Measurements(scores, features, stats)


class MetricAccumulator:
    """Metrics over measured images; the images themselves are not kept.

    Memory is that of the features: 4 bytes x dim x images, 40 MB for 5,000 images and 2048 dimensions.
    """

    def __init__(self, rewards: Sequence[str], references: Mapping[str, Reference], features: str, clip: str) -> None:
        """Create an empty accumulator.

        Args:
            rewards: names of the rewards.
            references: by extractor.
            features: the extractor whose features FID and KID use.
            clip: the extractor whose features CMMD and diversity use.
        """
        self.scores = {name: MeanScore() for name in rewards}
        self.fid = FrechetDistance(references[features].gaussian)
        self.kid = KernelDistance(references[features].features)
        self.cmmd = ClipDistance(references[clip].features)
        self.diversity = Diversity()
        self.stats = ImageStatistics(IMAGE_STATS)
        self._features = features
        self._clip = clip

    def update(self, measured: Measurements, groups: torch.Tensor) -> None:
        """Add n images; `groups` int64 [n] are the numbers of their prompts, in the order of prompt ids."""
        for name, metric in self.scores.items():
            metric.update(measured.scores[name], groups)
        self.fid.update(measured.features[self._features])
        self.kid.update(measured.features[self._features], groups)
        self.cmmd.update(measured.features[self._clip], groups)
        self.diversity.update(measured.features[self._clip], groups)
        self.stats.update(measured.stats)

    def merge_state(self, other: MetricAccumulator) -> None:
        """Add the images of another accumulator of the same rewards and references, before this one's."""
        for name, metric in self.scores.items():
            metric.merge_state(other.scores[name])
        for name in ("fid", "kid", "cmmd", "diversity", "stats"):
            getattr(self, name).merge_state(getattr(other, name))

    def compute(self) -> dict[str, float]:
        """Return a flat record: the mean of every reward, FID, KID, CMMD, diversity and image statistics.

        Keys with an interval have `<name>_low` and `<name>_high` after them; image statistics have `<name>_std`, over
        images.
        """
        record: dict[str, float] = {"images": len(self.kid.arrays()[1])}
        for name, metric in self.scores.items():
            record |= metric.compute().flat(name)
        record["fid"] = self.fid.compute()
        for name in ("kid", "cmmd", "diversity"):
            record |= getattr(self, name).compute().flat(name)
        return record | self.stats.compute()
