"""One candidate image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any

    import torch


@dataclass(eq=False)
class Candidate:
    """One candidate. `image`, its cell, and `latents` float16 are None if it was stopped early."""

    row: int
    index: int
    seed: int
    audited: bool = False
    preview_scores: list[float] = field(default_factory=list)
    stopped_at: int = 0
    would_stop_at: int | None = None
    latents: torch.Tensor | None = None
    image: Future[dict[str, Any]] | None = None
