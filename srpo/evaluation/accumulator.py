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
    OpenDiversity,
)
from srpo.evaluation.reference import Reference
from srpo.rewards.batches import score_batch
from srpo.rewards.protocol import AttributeReward, Pixels, Reward


class Measurements(NamedTuple):
    """The measured values of n images.

    Attributes:
        scores: float32 [n] by reward.
        features: float32 [n, dim] by extractor.
        stats: float64 [n] by image statistic.
        attributes: int64 [n, k] by judge; empty without `evaluate.diversity_judge`.
    """

    scores: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]
    stats: dict[str, torch.Tensor]
    attributes: dict[str, torch.Tensor]


def measure(
    images: Pixels,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    extractors: Mapping[str, Extractor],
    attributes: Mapping[str, AttributeReward] | None = None,
) -> Measurements:
    """Measure uint8 [n, 3, height, width]. Single values may be NaN or infinite; metrics leave them out.

    Args:
        attributes: the judge, by its name, that names what images show of what their prompts leave open, if any.

    Raises:
        UserError: all scores or features of a reward are NaN or infinite.
    """
    scores = score_batch(rewards, images, prompts)
    features = {name: extractor.features(images) for name, extractor in extractors.items()}
    for name, values in (*scores.items(), *features.items()):
        if not bool(torch.isfinite(values).any()):
            raise UserError(f"rewards.{name}: NaN or infinity for all of {len(images)} images; correct the reward")
    stats = {name: torch.from_numpy(values) for name, values in image_stats(images.numpy()).items()}
    shown = {name: judge.attributes(images, prompts) for name, judge in (attributes or {}).items()}
    return Measurements(scores, features, stats, shown)


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
        self.open_diversity = OpenDiversity()
        self.stats = ImageStatistics(IMAGE_STATS)
        self.images = 0
        self._features = features
        self._clip = clip

    def update(self, measured: Measurements, groups: torch.Tensor) -> None:
        """Add n images; `groups` int64 [n] are the numbers of their prompts, in the order of prompt ids."""
        for name, metric in self.scores.items():
            metric.update(measured.scores[name], groups)
        features, numbers = _finite(measured.features[self._features], groups)
        self.fid.update(features)
        self.kid.update(features, numbers)
        features, numbers = _finite(measured.features[self._clip], groups)
        self.cmmd.update(features, numbers)
        self.diversity.update(features, numbers)
        for values in measured.attributes.values():
            self.open_diversity.update(values, groups)
        self.stats.update(measured.stats)
        self.images += len(groups)

    def merge_state(self, other: MetricAccumulator) -> None:
        """Add the images of another accumulator of the same rewards and references, before this one's."""
        for name, metric in self.scores.items():
            metric.merge_state(other.scores[name])
        for name in ("fid", "kid", "cmmd", "diversity", "open_diversity", "stats"):
            getattr(self, name).merge_state(getattr(other, name))
        self.images += other.images

    def compute(self) -> dict[str, float]:
        """Return a flat record: the mean of every reward, FID, KID, CMMD, diversity and image statistics.

        Keys with an interval have `<name>_low` and `<name>_high` after them; image statistics have `<name>_std`, over
        images. With one image per prompt there is no diversity. A reward with scores that are NaN or infinite has
        their number as `<name>_missing`.
        """
        record: dict[str, float] = {"images": self.images}
        for name, metric in self.scores.items():
            record |= metric.compute().flat(name)
            if missing := metric.missing():
                record[f"{name}_missing"] = missing
        record["fid"] = self.fid.compute()
        measures = ["kid", "cmmd", "diversity", *(["open_diversity"] if self.open_diversity.values else [])]
        for name in measures:
            estimate = getattr(self, name).compute()
            record |= estimate.flat(name) if estimate else {}
        return record | self.stats.compute()


def _finite(features: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features and groups of the images whose features are all finite."""
    finite = torch.isfinite(features).all(dim=1)
    return (features, groups) if bool(finite.all()) else (features[finite], groups[finite])
