"""Processes that end with their parent. On systems other than Linux these functions do nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def signal_at_parents_end(number: int) -> Callable[[], None]:
    """Return a function by which a process asks the kernel to send it signal `number` when its parent ends."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes  # not in the child: importing between fork and exec can hang

    pr_set_pdeathsig = 1
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(pr_set_pdeathsig, number)


def end_with_parent(number: int) -> Callable[[], None]:
    """Return a function for a new child to call: it gets signal `number` when its parent ends, or has ended already."""
    request = signal_at_parents_end(number)
    parent = os.getpid()

    def ask() -> None:
        request()
        if sys.platform == "linux" and os.getppid() != parent:
            os.kill(os.getpid(), number)

    return ask
