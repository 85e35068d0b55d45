"""Models that take turns on a device, for GPUs that can't hold all of them at once (`runtime.offload`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class Turns:
    """Keeps on a device only the models that compute; all others wait in the computer's memory.

    There is one per process, since all of its models share the device.
    """

    def __init__(self) -> None:
        self._present: list[weakref.ref[torch.nn.Module]] = []

    def bring(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        """Bring these modules to a device, after those that are there have left it."""
        wanted = list(modules)
        for reference in self._present:
            module = reference()
            if module is not None and not any(module is other for other in wanted):
                module.to("cpu")
        for module in wanted:
            module.to(device)
        self._present = [weakref.ref(module) for module in wanted]


TURNS = Turns()
