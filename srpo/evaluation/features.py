"""Extractors of image features: a judge's image encoder, or the InceptionV3 of published FID numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srpo.config.loader import Params
from srpo.config.reward_families import FAMILIES
from srpo.config.schema import INCEPTION
from srpo.lineage.code import import_closure_digest
from srpo.lineage.identity import COMMIT
from srpo.rewards.protocol import Pixels
from srpo.rewards.validated import ValidatedReward
from srpo.runtime.device import pick_device, pick_reward_dtype
from srpo.storage.hashing import digest, file_digest

LIBRARIES = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Extractor:
    """A function from images to features.

    Attributes:
        features: uint8 [n, 3, height, width] to float32 [n, dim] on the CPU.
        identity: everything that the features depend on besides the images, JSON-able; None if it is unknown, as for
            a Hub model that is not pinned to a commit.
    """

    features: Callable[[Pixels], torch.Tensor]
    identity: Any


def load_extractors(params: Params, root: Path, rewards: Mapping[str, ValidatedReward]) -> dict[str, Extractor]:
    """Return the extractors that the section `evaluate` names: `inception`, or a judge's.

    Raises:
        UserError: InceptionV3's weights are missing and can't be downloaded.
    """
    extractors: dict[str, Extractor] = {}
    for name in dict.fromkeys((params.evaluate.features, params.evaluate.clip_name)):
        if name == INCEPTION:
            extractors[name] = _inception(params)
        else:
            extractors[name] = Extractor(rewards[name].features, _identity(params, root, name))
    return extractors


def _inception(params: Params) -> Extractor:
    from srpo.evaluation.inception import InceptionFeatures

    network = InceptionFeatures(pick_device(params.runtime))
    return Extractor(
        network.features, [file_digest(network.weights), _surroundings(params, InceptionFeatures.__module__)]
    )


def _identity(params: Params, root: Path, name: str) -> Any:
    spec = params.rewards[name]
    if spec.kind not in FAMILIES or spec.model is None:  # the code of a user's own class may change at any time
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
