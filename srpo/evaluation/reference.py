"""Features of the reference set and their moments, cached by content hash."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from srpo.config.schema import MIN_REFERENCE_IMAGES
from srpo.data.image_files import find_images, read_images
from srpo.errors import UserError
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import Gaussian
from srpo.evaluation.metrics import FittedGaussian
from srpo.rewards.batches import BATCH, batched
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.hashing import digest, value_digest

log = logging.getLogger(__name__)

MAX_CACHED = 8


@dataclass(frozen=True)
class Reference:
    """Features float32 [m, dim] of all reference images, and the Gaussian fitted to them."""

    features: np.ndarray
    gaussian: Gaussian


def load_reference(path: Path, extractor: Extractor, cache: Path) -> Reference:
    """Return the reference of a parquet file, or of a folder of parquet or image files (`find_images`).

    A cached file is named by the hash of the images' data and of the extractor's identity, and has a checksum:
    neither another set nor a damaged file is used by mistake.

    Raises:
        UserError: the data is missing, an image is damaged, or there are fewer than 3.
    """
    if extractor.identity is None:
        return _compute(path, extractor)
    file = cache / f"reference-{value_digest([digest(path), extractor.identity])[:32]}"
    if file.exists():
        try:
            return _unpack(load_with_checksum(file))
        except (OSError, ValueError):
            log.warning("%s: damaged; computing it again", file)
    reference = _compute(path, extractor)
    save_with_checksum(_pack(reference), file)
    for old in sorted(cache.glob("reference-*"), key=lambda item: item.stat().st_mtime)[:-MAX_CACHED]:
        old.unlink(missing_ok=True)
    return reference


def _compute(path: Path, extractor: Extractor) -> Reference:
    fit: FittedGaussian | None = None
    parts: list[torch.Tensor] = []
    for pixels in batched(read_images(find_images(path)), BATCH):
        # channels stay last in memory, as in the images that are evaluated
        images = [torch.from_numpy(image[None]).permute(0, 3, 1, 2) for image in pixels]
        # reference images may differ in size, those of a batch can't
        same = len({image.shape for image in images}) == 1
        batches = [torch.cat(images)] if same else images
        features = torch.cat([extractor.features(batch) for batch in batches])
        if fit is None:
            fit = FittedGaussian(features.shape[1])
        fit.update(features)
        parts.append(features)
    count = sum(map(len, parts))
    if fit is None or count < MIN_REFERENCE_IMAGES:
        raise UserError(
            f"{path}: {count} reference images are too few; evaluate.reference needs {MIN_REFERENCE_IMAGES}"
        )
    return Reference(torch.cat(parts).numpy(), fit.gaussian())


def _pack(reference: Reference) -> dict[str, torch.Tensor]:
    gaussian = reference.gaussian
    arrays = {"features": reference.features, "mean": gaussian.mean, "covariance": gaussian.covariance}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _unpack(tensors: dict[str, torch.Tensor]) -> Reference:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Reference(arrays["features"], Gaussian(arrays["mean"], arrays["covariance"]))
