"""The reference set's features and their moments, computed once and kept by content hash."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from srpo.data import parquet
from srpo.errors import UserError
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import Gaussian, Moments
from srpo.rewards.batches import BATCH, batched, to_tensor
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.hashing import digest, value_digest

log = logging.getLogger("srpo")

FEWEST = 3
KEPT = 8


@dataclass(frozen=True)
class Reference:
    """Features float32 [m, dim] of all reference pictures, and the Gaussian fitted to them."""

    features: np.ndarray
    gaussian: Gaussian


def load_reference(path: Path, extractor: Extractor, cache: Path) -> Reference:
    """The reference of a parquet file or folder with a column `image`.

    A file in `cache` is named by the hash of the pictures' data and of the extractor's identity, and is sealed with
    the hash of its own content: neither another set nor a damaged file is ever taken for it.

    Raises:
        UserError: the data is missing or damaged, or holds fewer than 3 pictures.
    """
    if extractor.identity is None:
        return _compute(path, extractor)
    file = cache / f"reference-{value_digest([digest(path), extractor.identity])[:32]}"
    if file.exists():
        try:
            return _unpack(load_with_checksum(file))
        except (OSError, ValueError):
            log.warning("%s: damaged; computed anew", file)
    reference = _compute(path, extractor)
    save_with_checksum(_pack(reference), file)
    for old in sorted(cache.glob("reference-*"), key=lambda item: item.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return reference


def _compute(path: Path, extractor: Extractor) -> Reference:
    moments, parts = Moments(), []
    for cells in batched((row["image"] for row in parquet.read_rows(path, ["image"])), BATCH):
        # pictures of a reference set may differ in size, and a batch can't
        pictures = [to_tensor([cell]) for cell in cells]
        same = len({picture.shape for picture in pictures}) == 1
        batches = [torch.cat(pictures)] if same else pictures
        features = torch.cat([extractor.features(batch) for batch in batches]).numpy()
        moments.add(features)
        parts.append(features)
    if moments.count < FEWEST:
        raise UserError(f"{path}: {moments.count} reference pictures are too few; evaluate.reference needs {FEWEST}")
    return Reference(np.concatenate(parts), moments.gaussian())


def _pack(reference: Reference) -> dict[str, torch.Tensor]:
    fitted = reference.gaussian
    arrays = {"features": reference.features, "mean": fitted.mean, "covariance": fitted.covariance}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _unpack(tensors: dict[str, torch.Tensor]) -> Reference:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Reference(arrays["features"], Gaussian(arrays["mean"], arrays["covariance"]))
