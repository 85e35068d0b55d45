"""Drift: the distance of a round's images to base's own images of the same prompts and noise."""

from __future__ import annotations

import numpy as np

from srpo.data.records import HasEvaluation
from srpo.errors import UserError
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.kernel import paired_kid
from srpo.storage.checksummed import load_with_checksum

FEATURES_FILE = "features.safetensors"


def read_base_features(base: HasEvaluation) -> np.ndarray:
    """Read the features [images, dim] of base's images at the reported guidance.

    Raises:
        UserError: they are missing or damaged.
    """
    path = base.evaluation / FEATURES_FILE
    try:
        return load_with_checksum(path)["features"].numpy()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); run `srpo evaluate base`, or `dvc checkout`") from None


def drift_from_base(base: HasEvaluation, features: np.ndarray, base_features: np.ndarray) -> dict[str, float]:
    """Return FID and KID of a round's features [images, dim] against base's, without images that have none.

    Raises:
        UserError: base was evaluated with other images.
    """
    if base_features.shape != features.shape:
        raise UserError(
            f"{base.evaluation / FEATURES_FILE}: {base_features.shape} features, but this round has {features.shape};"
            " run `srpo evaluate base`"
        )
    finite = np.isfinite(features).all(axis=1) & np.isfinite(base_features).all(axis=1)
    if not finite.all():
        features, base_features = features[finite], base_features[finite]
    distance = frechet_distance(gaussian(features), gaussian(base_features))
    return {"drift": distance, "drift_kid": paired_kid(features, base_features)}
