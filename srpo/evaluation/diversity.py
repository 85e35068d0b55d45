"""Diversity of the images of one prompt: of their embeddings, or of what they show."""

from __future__ import annotations

import numpy as np

from srpo.evaluation.bootstrap import Estimate, Groups, mean_interval


def diversity(features: np.ndarray, groups: Groups) -> Estimate | None:
    """Return the mean cosine distance (0 to 2) between the images of one prompt, averaged over prompts.

    None if no prompt has two images.

    Args:
        features: [n, dim].
        groups: the prompt of each row. Prompts with a single image do not count.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    names = np.asarray(groups)
    distances = {}
    for name in dict.fromkeys(names.tolist()):
        rows = unit[names == name]
        if len(rows) > 1:
            similarity = (rows @ rows.T).sum() - len(rows)
            distances[name] = 1 - similarity / (len(rows) * (len(rows) - 1))
    if not distances:
        return None
    return mean_interval(np.array(list(distances.values())), list(distances))


def open_diversity(attributes: np.ndarray, groups: Groups) -> Estimate | None:
    """Return the chance that two right images of one prompt differ in an attribute that the prompt leaves open.

    It is the Gini-Simpson index in its unbiased form, 1 - sum n_i (n_i - 1) / (n (n - 1)) over the n_i images with each
    value (Simpson, Measurement of Diversity, Nature 1949), averaged over attributes and prompts by their n (n - 1) / 2
    pairs of images; 0 to 1. Equal weights would have the prompts with only two right images decide, whose index is
    mostly chance. It does not depend on the number of images, so a model that is right more often is not more diverse
    by that. None if no prompt has two right images.

    Args:
        attributes: int64 [n, k], as of `AttributeReward`.
        groups: the prompt of each row.
    """
    names = np.asarray(groups)
    indexes, pairs, prompts = [], [], []
    for name in dict.fromkeys(names.tolist()):
        for column in attributes[names == name].T:
            shown = column[column >= 0]
            if len(shown) > 1:
                indexes.append(_gini_simpson(shown))
                pairs.append(len(shown) * (len(shown) - 1) // 2)
                prompts.append(name)
    return mean_interval(np.repeat(indexes, pairs), np.repeat(prompts, pairs)) if indexes else None


def _gini_simpson(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return 1 - float((counts * (counts - 1)).sum()) / (len(values) * (len(values) - 1))
