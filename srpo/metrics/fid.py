"""Distances between two sets of image features, by clean-fid's code."""

from __future__ import annotations

import numpy as np
from cleanfid import fid


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """FID's formula (Heusel et al., 2017) on any features [n, dim] and [m, dim]; lower is better.

    Comparable only between sets of the same size and features. It is biased upward for small n.
    """
    return float(fid.frechet_distance(*_moments(features), *_moments(reference)))


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """KID (Binkowski et al., 2018): squared MMD with the cubic kernel, mean over 100 fixed subsets; lower is better."""
    state = np.random.get_state()
    np.random.seed(0)  # clean-fid draws its subsets from the global generator
    try:
        return float(fid.kernel_distance(features.astype(np.float64), reference.astype(np.float64)))
    finally:
        np.random.set_state(state)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)
