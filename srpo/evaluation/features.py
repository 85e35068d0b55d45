"""Where image features come from: a judge's image encoder, or the InceptionV3 of published FID numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION
from srpo.lineage.code import import_closure_digest
from srpo.lineage.identity import COMMIT
from srpo.rewards.families import FAMILIES
from srpo.rewards.protocol import FeatureReward, Pixels
from srpo.runtime.device import pick_device, pick_reward_dtype
from srpo.storage.hashing import digest, file_digest

LIBRARIES = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Extractor:
    """Turns pictures into features.

    `identity` is all that the numbers depend on beside the pictures, JSON-able; None when that can't be told,
    as for a Hub model that is not pinned to a commit.
    """

    features: Callable[[Pixels], torch.Tensor]
    identity: Any


def load_extractors(params: Params, root: Path, rewards: Mapping[str, FeatureReward]) -> dict[str, Extractor]:
    """The extractors that `evaluate` names, by their names there: `inception`, or the judge's own.

    Raises:
        UserError: InceptionV3's weights can't be had.
    """
    found = {}
    for name in dict.fromkeys((params.evaluate.features, params.evaluate.clip_name)):
        if name == INCEPTION:
            found[name] = _inception(params)
        else:
            found[name] = Extractor(rewards[name].features, _identity(params, root, name))
    return found


def _inception(params: Params) -> Extractor:
    from srpo.evaluation.inception import InceptionFeatures

    network = InceptionFeatures(pick_device(params.runtime))
    return Extractor(
        network.features, [file_digest(network.weights), _surroundings(params, InceptionFeatures.__module__)]
    )


def _identity(params: Params, root: Path, name: str) -> Any:
    spec = params.rewards[name]
    if spec.kind not in FAMILIES or spec.model is None:  # the code of a class of the user's own may change any time
        return None
    module = FAMILIES[spec.kind].path.split(":")[0]
    if (root / spec.model).exists():
        return [spec.kind, digest(root / spec.model), _surroundings(params, module)]
    if spec.revision and COMMIT.fullmatch(spec.revision):
        return [spec.kind, spec.model, spec.revision, _surroundings(params, module)]
    return None


def _surroundings(params: Params, module: str) -> list[Any]:
    """Return the code that computes the features of a reference set, library versions, device and dtype."""
    code = import_closure_digest("srpo.evaluation.reference", module)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    # a CPU and a GPU differ in the last digits, and the numbers must not depend on who filled the cache
    device = pick_device(params.runtime)
    return [code, versions, device.type, str(pick_reward_dtype(params.runtime, device))]
