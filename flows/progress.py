"""Progress of a flow as one artifact for all its stages, updated at most every two seconds."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.names import artifact_key

EVERY_SECONDS = 2.0
PERCENT = re.compile(r"(\d+)%\|")  # tqdm's format

current: ContextVar[Progress] = ContextVar("progress")


class Progress:
    """Share of a flow's stages that is done. Its methods may be called by any thread."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.total = len(stages)
        self.done: set[str] = set()
        self.running: dict[str, int] = {}
        self.shown_at = time.monotonic()
        self.lock = threading.Lock()
        # synchronous here, and a coroutine in async flows
        self.artifact = cast(
            "UUID", create_progress_artifact(0.0, key=artifact_key("progress"), description=self._describe())
        )

    def update(self, stage: str, state: str = "") -> None:
        """Record that a stage runs, with the text of its progress bar."""
        percent = PERCENT.findall(state)
        with self.lock:
            if percent or stage not in self.running:
                self.running[stage] = int(percent[-1]) if percent else 0
            if time.monotonic() - self.shown_at < EVERY_SECONDS:
                return
            self._show()

    def end(self, stage: str, done: bool) -> None:
        """Record that a stage has ended."""
        with self.lock:
            self.running.pop(stage, None)
            if done:
                self.done.add(stage)
            if time.monotonic() - self.shown_at >= EVERY_SECONDS:
                self._show()

    def finish(self) -> None:
        """Show the final state, however recent the last update."""
        with self.lock:
            self._show()

    def _show(self) -> None:
        self.shown_at = time.monotonic()
        share = len(self.done) + sum(self.running.values()) / 100
        with contextlib.suppress(httpx.HTTPError):  # a display must not stop a flow
            update_progress_artifact(self.artifact, 100 * share / max(self.total, 1), self._describe())

    def _describe(self) -> str:
        running = ", ".join(f"{stage} {percent} %" for stage, percent in sorted(self.running.items()))
        return f"{len(self.done)} of {self.total} stages" + (f"; now {running}" if running else "")
