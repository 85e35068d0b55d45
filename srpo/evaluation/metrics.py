"""Metrics over batches of images as `torchmetrics.Metric`s: update, compute, merge_state.

The formulas are this package's own, in float64 and with intervals: torchmetrics' FID keeps sums of squares and its KID
draws random subsets. Batches may be split over accumulators in any way; `merge_state` puts the other's images first.
Groups are the numbers of the images' prompts: images of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from srpo.evaluation.bootstrap import Estimate, mean_interval
from srpo.evaluation.diversity import diversity, open_diversity
from srpo.evaluation.frechet import Gaussian, frechet_distance, merge_moments, moments, unpack_moments
from srpo.evaluation.kernel import cmmd, kid


class _GroupedMetric(Metric):
    """Keeps one tensor per image, float [n] or [n, dim], and the images' groups."""

    is_differentiable = False
    full_state_update = False

    values: list[torch.Tensor]
    groups: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, values: torch.Tensor, groups: torch.Tensor) -> None:
        """Add n images: their values, and int64 [n] groups."""
        self.values.append(values)
        self.groups.append(groups)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values and groups of all images, in the order of updates."""
        return dim_zero_cat(self.values).numpy(), dim_zero_cat(self.groups).numpy()


class MeanScore(_GroupedMetric):
    """The mean of the finite ones of scores float32 [n], with the bootstrap's interval over prompts."""

    higher_is_better = True

    def compute(self) -> Estimate:
        """Return the mean and its 95 % interval; NaN if no score is finite."""
        scores, groups = self.arrays()
        finite = np.isfinite(scores)
        if not finite.any():
            return Estimate(math.nan, math.nan, math.nan)
        return mean_interval(scores[finite], groups[finite])

    def missing(self) -> int:
        """Return the number of scores that are NaN or infinite."""
        return int((~np.isfinite(self.arrays()[0])).sum())


class Diversity(_GroupedMetric):
    """The mean cosine distance between images of one prompt, from features float32 [n, dim]; 0 to 2."""

    higher_is_better = True

    def compute(self) -> Estimate | None:
        """Return the mean over prompts and its 95 % interval; None if no prompt has two images."""
        return diversity(*self.arrays())


class OpenDiversity(_GroupedMetric):
    """The chance that two right images of one prompt differ in what it leaves open, from attributes int64 [n, k]."""

    higher_is_better = True

    def compute(self) -> Estimate | None:
        """Return the mean over prompts and its 95 % interval; None if no prompt has two right images."""
        return open_diversity(*self.arrays())


class KernelDistance(_GroupedMetric):
    """KID, from features float32 [n, dim]; lower is closer to the reference set."""

    higher_is_better = False

    def __init__(self, reference: np.ndarray) -> None:
        """Take the reference set's features, float32 [m, dim]."""
        super().__init__()
        self.reference = reference

    def compute(self) -> Estimate:
        """Return the distance and its 95 % interval."""
        features, groups = self.arrays()
        return kid(features, self.reference, groups)


class ClipDistance(KernelDistance):
    """CMMD, from CLIP image embeddings float32 [n, dim]; lower is closer to the reference set."""

    def compute(self) -> Estimate:
        """Return the distance and its 95 % interval."""
        features, groups = self.arrays()
        return cmmd(features, self.reference, groups)


class FittedGaussian(Metric):
    """Mean and covariance of features; memory is 8 * dim * dim bytes, whatever the number of images."""

    is_differentiable = False
    full_state_update = False

    moments: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        empty = torch.zeros(1 + dim + dim * dim, dtype=torch.float64)
        self.add_state("moments", empty, dist_reduce_fx=_merge_all)

    def update(self, features: torch.Tensor) -> None:
        """Add features [n, dim] of any float dtype; n may be 0."""
        self.moments = torch.from_numpy(merge_moments(self.moments.numpy(), moments(features.numpy())))

    def gaussian(self) -> Gaussian:
        """Return the Gaussian with the moments of all features, of which there must be two."""
        count, mean, scatter = unpack_moments(self.moments.numpy())
        return Gaussian(mean, scatter / (count - 1))

    def compute(self) -> Any:
        """Return mean float64 [dim] and covariance float64 [dim, dim]."""
        gaussian = self.gaussian()
        return torch.from_numpy(gaussian.mean), torch.from_numpy(gaussian.covariance)


class FrechetDistance(FittedGaussian):
    """The Frechet distance to a reference; with Inception's features it is FID. Lower is closer."""

    higher_is_better = False

    def __init__(self, reference: Gaussian) -> None:
        super().__init__(len(reference.mean))
        self.reference = reference

    def compute(self) -> float:
        """Return the distance, at least 0."""
        return frechet_distance(self.gaussian(), self.reference)


class ImageStatistics(Metric):
    """Mean and standard deviation over images of each statistic of `image_stats`."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, stats: Mapping[str, torch.Tensor]) -> None:
        """Add n images: float64 [n] by statistic."""
        for name in self.names:
            getattr(self, name).append(stats[name])

    def compute(self) -> dict[str, float]:
        """Return `<name>` and `<name>_std` (divisor n - 1) of every statistic."""
        record: dict[str, float] = {}
        for name in self.names:
            values = dim_zero_cat(getattr(self, name)).numpy()
            record |= {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}
        return record


def _merge_all(stacked: torch.Tensor) -> torch.Tensor:
    """Merge packed moments [k, 1 + dim + dim * dim]."""
    merged = stacked[0].numpy()
    for part in stacked[1:]:
        merged = merge_moments(merged, part.numpy())
    return torch.from_numpy(merged)
