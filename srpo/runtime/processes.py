"""Processes that end with their parent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def signal_at_parents_end(number: int) -> Callable[[], None]:
    """A function by which a process asks the kernel to send it signal `number` when its parent ends."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes  # here and not in a new child: importing between fork and exec can hang

    pr_set_pdeathsig, prctl = 1, ctypes.CDLL(None).prctl
    return lambda: prctl(pr_set_pdeathsig, number)


def end_with_parent(number: int) -> Callable[[], None]:
    """A function that a new child calls so that it gets signal `number` when its parent ends, or has ended already."""
    request, parent = signal_at_parents_end(number), os.getpid()

    def ask() -> None:
        request()
        if sys.platform == "linux" and os.getppid() != parent:
            os.kill(os.getpid(), number)

    return ask
