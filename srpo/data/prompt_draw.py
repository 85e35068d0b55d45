"""Which prompts of a pool a round makes candidates for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srpo.data.prompts import Prompt
from srpo.storage.hashing import derive_seed


@dataclass(frozen=True)
class Draw:
    """What one round draws: `count` prompts (None: all) among those whose tags have these values."""

    count: int | None
    tags: Mapping[str, Sequence[str]]

    def fits(self, prompt: Prompt) -> bool:
        """Return whether the prompt has one of the values of every tag."""
        return all(prompt.tags.get(name) in values for name, values in self.tags.items())


def draw_prompts(pool: Sequence[Prompt], path: Sequence[Draw], seed: int) -> list[Prompt]:
    """Return the prompts of the last round of a path, in the pool's order.

    Every round takes the prompts that the rounds before it took least often, so none comes twice before all that fit
    were taken; which come first is random and depends only on the seed and the prompts' ids. A round that draws more
    than fit takes all that fit.

    Args:
        pool: of distinct ids.
        path: the draws of the rounds from base to this one, the oldest first.
        seed: of the draws.
    """
    taken: Counter[str] = Counter()
    drawn: list[Prompt] = []
    for draw in path:
        fitting = [prompt for prompt in pool if draw.fits(prompt)]
        if draw.count is not None and draw.count < len(fitting):
            order = {prompt.id: (taken[prompt.id], derive_seed(seed, "draw", taken[prompt.id], prompt.id))
                     for prompt in fitting}  # fmt: skip
            chosen = set(sorted(order, key=lambda name: order[name])[: draw.count])
            fitting = [prompt for prompt in fitting if prompt.id in chosen]
        taken.update(prompt.id for prompt in fitting)
        drawn = fitting
    return drawn
