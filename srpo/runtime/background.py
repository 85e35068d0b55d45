"""Work beside the main thread, so that the device need not wait for pictures to be encoded and written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

PENDING = 2


class Background:
    """One thread that does what it is given, in order. An error there comes out of the next call, or at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="srpo-writer")
        self._pending: deque[Future] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done; waits while PENDING pieces are not done yet."""
        self._drain(PENDING - 1)
        self._pending.append(self._thread.submit(work))

    def _drain(self, left: int) -> None:
        while len(self._pending) > left or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._drain(0)
        finally:
            self._thread.shutdown(cancel_futures=True)
