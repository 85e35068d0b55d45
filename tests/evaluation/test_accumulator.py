"""All metrics of one model at one guidance scale: the same record however batches are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srpo.errors import UserError
from srpo.evaluation.accumulator import MetricAccumulator, measure
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.image_stats import image_stats
from srpo.evaluation.kernel import cmmd, kid
from srpo.evaluation.reference import Reference

GROUPS = torch.arange(6).repeat_interleave(4)
PROMPTS = [f"image {i}" for i in GROUPS.tolist()]
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (24, 3, 16, 16), dtype=np.uint8))


class Brightness:
    def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3))


class Gaps(Brightness):
    """Undefined for dark images."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
        scores = super().score(images, prompts)
        return torch.where(scores > self.limit, scores, torch.nan)


def coarse(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def fine(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


EXTRACTORS = {"coarse": Extractor(coarse, None), "fine": Extractor(fine, None)}


def references() -> dict[str, Reference]:
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 200, (15, 3, 16, 16), dtype=np.uint8))
    features = {"coarse": coarse(images).numpy(), "fine": fine(images).numpy()}
    return {name: Reference(values, gaussian(values)) for name, values in features.items()}


def accumulate(*cuts: int, start: int = 0, stop: int = 24) -> MetricAccumulator:
    accumulator = MetricAccumulator(["brightness"], references(), "coarse", "fine")
    for one, two in zip((start, *cuts), (*cuts, stop), strict=True):
        measured = measure(IMAGES[one:two], PROMPTS[one:two], {"brightness": Brightness()}, EXTRACTORS)
        accumulator.update(measured, GROUPS[one:two])
    return accumulator


def test_batches_do_not_matter() -> None:
    assert accumulate(1, 7, 20).compute() == pytest.approx(accumulate().compute(), rel=1e-9)


def test_merged_state_equals_one_accumulator() -> None:
    merged = accumulate(start=14)
    middle = accumulate(11, start=5, stop=14)
    middle.merge_state(accumulate(stop=5))
    merged.merge_state(middle)
    assert merged.compute() == pytest.approx(accumulate().compute(), rel=1e-9)
    assert np.array_equal(merged.kid.arrays()[0], coarse(IMAGES).numpy()), "images of the argument come first"


def test_nan_is_counted_and_left_out() -> None:
    limit = float(Brightness().score(IMAGES, PROMPTS).sort().values[1])
    accumulator = MetricAccumulator(["gaps"], references(), "coarse", "fine")
    measured = measure(IMAGES, PROMPTS, {"gaps": Gaps(limit)}, EXTRACTORS)
    accumulator.update(measured, GROUPS)
    record = accumulator.compute()
    assert record["gaps_missing"] == 2
    assert record["gaps"] == pytest.approx(float(Brightness().score(IMAGES, PROMPTS).sort().values[2:].mean()))
    assert {name: record[name] for name in ("fid", "kid")} == {
        name: accumulate().compute()[name] for name in ("fid", "kid")
    }


def test_features_that_are_nan_are_left_out() -> None:
    def odd(images: torch.Tensor) -> torch.Tensor:
        features = coarse(images)
        features[5, 2] = torch.nan
        return features

    accumulator = MetricAccumulator([], references(), "coarse", "fine")
    extractors = {"coarse": Extractor(odd, None), "fine": Extractor(fine, None)}
    accumulator.update(measure(IMAGES, PROMPTS, {}, extractors), GROUPS)
    record, kept = accumulator.compute(), [i for i in range(24) if i != 5]
    assert record["images"] == 24
    assert record["kid"] == kid(coarse(IMAGES[kept]).numpy(), references()["coarse"].features, GROUPS[kept]).value


def test_a_reward_without_any_score_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^rewards\.gaps: NaN or infinity for all of 24 images"):
        measure(IMAGES, PROMPTS, {"gaps": Gaps(256)}, EXTRACTORS)


def test_one_image_per_prompt_has_no_diversity() -> None:
    accumulator = MetricAccumulator([], references(), "coarse", "fine")
    accumulator.update(measure(IMAGES, PROMPTS, {}, EXTRACTORS), torch.arange(24))
    assert not [name for name in accumulator.compute() if name.startswith("diversity")]


def test_record_holds_the_metrics() -> None:
    record, reference = accumulate(11).compute(), references()
    x, embeds = coarse(IMAGES).numpy(), fine(IMAGES).numpy()
    assert record["images"] == 24
    assert record["fid"] == pytest.approx(frechet_distance(gaussian(x), reference["coarse"].gaussian))
    expected = kid(x, reference["coarse"].features, PROMPTS).flat("kid")
    expected |= cmmd(embeds, reference["fine"].features, PROMPTS).flat("cmmd")
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    values = image_stats(IMAGES.numpy())["saturation"]
    assert (record["saturation"], record["saturation_std"]) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert record["brightness_low"] < record["brightness"] < record["brightness_high"]
