"""One model at one guidance: the same record however the pictures came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srpo.data.prompts import Prompt
from srpo.errors import UserError
from srpo.evaluation.accumulator import Observation
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.image_stats import image_stats
from srpo.evaluation.kernel import clip_distance, kernel_distance
from srpo.evaluation.reference import Reference

PLACES = [(Prompt(id=f"p{i}", prompt=f"picture {i}"), index) for i in range(6) for index in range(4)]
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (24, 3, 16, 16), dtype=np.uint8))


class Brightness:
    def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3))


def coarse(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def fine(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def observe(*cuts: int) -> dict[str, float]:
    extractors = {"coarse": Extractor(coarse, None), "fine": Extractor(fine, None)}
    seen = Observation({"brightness": Brightness()}, extractors, "coarse")
    for start, stop in zip((0, *cuts), (*cuts, 24), strict=True):
        seen.add(IMAGES[start:stop], PLACES[start:stop])
    assert [(row["prompt_id"], row["index"]) for row in seen.rows] == [(p.id, i) for p, i in PLACES]
    return seen.measures(references(), "fine")


def references() -> dict[str, Reference]:
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 200, (15, 3, 16, 16), dtype=np.uint8))
    features = {"coarse": coarse(pictures).numpy(), "fine": fine(pictures).numpy()}
    return {name: Reference(values, gaussian(values)) for name, values in features.items()}


def test_streaming_equals_one_batch() -> None:
    assert observe(1, 7, 20) == pytest.approx(observe(), rel=1e-9)


def test_what_is_no_number_stops_it() -> None:
    class Broken(Brightness):
        def score(self, images: torch.Tensor, prompts) -> torch.Tensor:
            return super().score(images, prompts) / 0 * 0

    seen = Observation({"broken": Broken()}, {"coarse": Extractor(coarse, None)}, "coarse")
    with pytest.raises(UserError, match=r"^rewards\.broken: NaN"):
        seen.add(IMAGES, PLACES)


def test_the_record_is_made_of_the_measures() -> None:
    found, reference = observe(11), references()
    prompts = [prompt.id for prompt, _ in PLACES]
    x, embeds = coarse(IMAGES).numpy(), fine(IMAGES).numpy()
    assert found["images"] == 24
    assert found["fid"] == pytest.approx(frechet_distance(gaussian(x), reference["coarse"].gaussian))
    expected = kernel_distance(x, reference["coarse"].features, prompts).flat("kid")
    expected |= clip_distance(embeds, reference["fine"].features, prompts).flat("cmmd")
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    values = image_stats(IMAGES.numpy())["saturation"]
    assert (found["saturation"], found["saturation_std"]) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert found["brightness_low"] < found["brightness"] < found["brightness_high"]
