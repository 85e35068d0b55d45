"""The size of each prompt's images."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.config.schema import ImageSize, SamplingParams
from srpo.data.prompts import Prompt
from srpo.storage.hashing import derive_seed


def size_of(prompt: Prompt, sampling: SamplingParams) -> ImageSize:
    """Return the size of a prompt's images: its line's own, one of `sizes` by its id, or `width` x `height`."""
    if prompt.width and prompt.height:
        return ImageSize(width=prompt.width, height=prompt.height)
    allowed = allowed_sizes(sampling)
    return allowed[derive_seed("size", prompt.id) % len(allowed)]


def allowed_sizes(sampling: SamplingParams) -> list[ImageSize]:
    """Return the sizes of images whose prompt's line asks for none."""
    return sampling.sizes or [ImageSize(width=sampling.width, height=sampling.height)]


def rows_by_size(prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[ImageSize, list[int]]:
    """Return the rows of the prompts of each size, sizes in the order of their first prompts."""
    rows: dict[ImageSize, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(size_of(prompt, sampling), []).append(row)
    return rows


def of_size(sampling: SamplingParams, size: ImageSize) -> SamplingParams:
    """Return these settings for images of one size."""
    return sampling.model_copy(update={"width": size.width, "height": size.height, "sizes": None})


def untrained_sizes(
    train: Sequence[Prompt], generate: SamplingParams, held_out: Sequence[Prompt], evaluate: SamplingParams
) -> str | None:
    """Return a sentence that names the sizes that are evaluated and not trained, or None if there is none."""
    trained = rows_by_size(train, generate)
    others = [size for size in rows_by_size(held_out, evaluate) if size not in trained]
    if not others:
        return None
    return (
        f"images of {names_of(others)} are evaluated, and training uses images of {names_of(list(trained))}: a model is"
        " best at the sizes that it was trained on"
    )


def names_of(sizes: Sequence[ImageSize]) -> str:
    """Return sizes as words."""
    return ", ".join(f"{size.width} x {size.height}" for size in sizes)
