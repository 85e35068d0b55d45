"""The MLP that turns an embedding into a reward, in the checkpoint layout that two rewards share."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)
# the published model has dropouts between these layers, which are counted in the names
NAMES = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


def load_head(state: Mapping[str, torch.Tensor], prefix: str = "") -> nn.Sequential:
    """Load five linear layers without activations, float32 [n, width] to [n, 1], from `<prefix>layers.0.weight` etc.

    Raises:
        KeyError, RuntimeError: tensors are missing or of other shapes.
    """
    weights = [state[f"{prefix}{name}.weight"] for name in NAMES]
    sizes = [weights[0].shape[1], *WIDTHS]
    head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))
    head.load_state_dict(
        {f"{i}.{part}": state[f"{prefix}{name}.{part}"] for i, name in enumerate(NAMES) for part in ("weight", "bias")}
    )
    return head.float().eval()
