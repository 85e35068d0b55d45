"""Diversity of the images of one prompt."""

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
