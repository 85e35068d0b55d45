"""The flow's live progress: one artifact for all its stages, updated at most every two seconds."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

KEY = "srpo-progress"
EVERY_SECONDS = 2.0
PERCENT = re.compile(r"(\d+)%\|")  # as tqdm writes it

current: ContextVar[Progress] = ContextVar("progress")


class Progress:
    """Which part of a flow's stages is done. Any thread may tell it."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.total = len(stages)
        self.done: set[str] = set()
        self.running: dict[str, int] = {}
        self.shown_at = time.monotonic()
        self.lock = threading.Lock()
        self.artifact = create_progress_artifact(0.0, key=KEY, description=self._words())

    def see(self, stage: str, state: str = "") -> None:
        """A stage runs, and this is what its progress bar shows."""
        percent = PERCENT.findall(state)
        with self.lock:
            if percent or stage not in self.running:
                self.running[stage] = int(percent[-1]) if percent else 0
            if time.monotonic() - self.shown_at < EVERY_SECONDS:
                return
            self._show()

    def leave(self, stage: str, done: bool) -> None:
        """A stage is over: done, or failed."""
        with self.lock:
            self.running.pop(stage, None)
            if done:
                self.done.add(stage)
            if time.monotonic() - self.shown_at >= EVERY_SECONDS:
                self._show()

    def finish(self) -> None:
        """Show how it ended, however short the last update is ago."""
        with self.lock:
            self._show()

    def _show(self) -> None:
        self.shown_at = time.monotonic()
        share = len(self.done) + sum(self.running.values()) / 100
        with contextlib.suppress(httpx.HTTPError):  # it only shows
            update_progress_artifact(self.artifact, 100 * share / max(self.total, 1), self._words())

    def _words(self) -> str:
        running = ", ".join(f"{stage} {percent} %" for stage, percent in sorted(self.running.items()))
        return f"{len(self.done)} of {self.total} stages" + (f"; now {running}" if running else "")
