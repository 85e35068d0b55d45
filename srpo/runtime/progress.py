"""Progress of a stage: the bar over its images, and what hears of a training's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tqdm import tqdm

from srpo.runtime import distributed

OnStep = Callable[[Mapping[str, float], int], None]
"""Called with the metrics of an optimizer step and its number."""


def image_progress(name: str, left: int) -> tqdm:
    """Return a bar over this process's share of the images that are still to be made; one process draws it.

    Args:
        name: stage and round.
        left: images of all processes.
    """
    processes = distributed.world_size()
    return tqdm(
        total=left // processes,
        unit="img",
        desc=f"{name}{f' (1 of {processes} processes)' if processes > 1 else ''}",
        mininterval=2,
        disable=not distributed.draws_progress(),
    )
