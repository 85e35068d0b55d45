"""Where image features come from: a judge's image encoder, or the InceptionV3 of published FID numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srpo.base import COMMIT
from srpo.device import pick_device
from srpo.errors import UserError
from srpo.hashing import code_digest, digest, file_digest
from srpo.params import INCEPTION, Params
from srpo.rewards import Reward
from srpo.rewards.base import Pixels

LIBRARIES = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Extractor:
    """Turns pictures into features.

    `identity` is all that the numbers depend on beside the pictures, JSON-able; None when that can't be told,
    as for a Hub model that is not pinned to a commit.
    """

    features: Callable[[Pixels], torch.Tensor]
    identity: Any


def load_extractors(params: Params, root: Path, rewards: Mapping[str, Reward]) -> dict[str, Extractor]:
    """The extractors that `evaluate` names, by their names there: `inception`, or the judge's own.

    Raises:
        UserError: a judge has no image features, or InceptionV3's weights can't be had.
    """
    found = {}
    for key in ("features", "clip_features"):
        name = params.evaluate.features if key == "features" else params.evaluate.clip_name
        if name in found:
            continue
        if name == INCEPTION:
            found[name] = _inception(params)
        elif not hasattr(rewards[name], "features"):
            raise UserError(
                f"evaluate.{key}: rewards of kind {params.rewards[name].kind!r} have no image features; "
                f"name a judge of another kind"
            )
        else:
            found[name] = Extractor(rewards[name].features, _identity(params, root, name))
    return found


def _inception(params: Params) -> Extractor:
    from srpo.metrics.inception import InceptionFeatures

    network = InceptionFeatures(pick_device(params.runtime))
    return Extractor(network.features, [file_digest(network.weights), _surroundings(params)])


def _identity(params: Params, root: Path, name: str) -> Any:
    spec = params.rewards[name]
    if (root / spec.model).exists():
        return [spec.kind, digest(root / spec.model), _surroundings(params)]
    if spec.revision and COMMIT.fullmatch(spec.revision):
        return [spec.kind, spec.model, spec.revision, _surroundings(params)]
    return None


def _surroundings(params: Params) -> list[Any]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    # a CPU and a GPU differ in the last digits, and the numbers must not depend on who filled the cache
    return [code_digest(), versions, pick_device(params.runtime).type]
