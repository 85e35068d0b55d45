"""Early rejection: candidates whose previews score low at a checkpoint are not finished.

Checkpoints divide the denoising steps into segments. Each segment has a queue, in which survivors of several prompts
wait until they fill a micro-batch, so that the device stays busy; at the end all queues are emptied.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from srpo.config.schema import EarlyRejectionParams, GenerateParams, ImageSize
from srpo.data.candidate import Candidate
from srpo.data.images import encode_later
from srpo.errors import UserError
from srpo.rewards.batches import BATCH, is_flat
from srpo.rewards.protocol import Reward
from srpo.sampling.conditioning import PromptEmbeds
from srpo.sampling.sampler import Sampler, seeded
from srpo.selection.audit import survivors

# schedulers that keep nothing from step to step but its number, and draw no random numbers
MEMORYLESS = ("EulerDiscreteScheduler", "DDIMScheduler")


class EarlyRejection:
    """Samples candidates and rejects those whose previews score low."""

    def __init__(self, sampler: Sampler, settings: GenerateParams, reward: Reward) -> None:
        """Prepare to sample with these settings, whose `early_rejection` is set.

        Raises:
            UserError: the base model's scheduler keeps history, which is lost at a checkpoint.
        """
        scheduler = type(sampler.pipeline.scheduler).__name__
        if scheduler not in MEMORYLESS:
            raise UserError(
                f"generate.early_rejection: the base model's {scheduler} keeps history between steps or draws noise;"
                f" use a base with {' or '.join(MEMORYLESS)}, or set early_rejection to null"
            )
        assert settings.early_rejection
        self.sampler = sampler
        self.settings = settings
        self.reward = reward
        self.rules: EarlyRejectionParams = settings.early_rejection
        self.stops = [*(point.step for point in self.rules.checkpoints), settings.num_inference_steps]

    def sample(
        self,
        embeds: PromptEmbeds,
        prompts: Sequence[str],
        candidates: Sequence[Candidate],
        size: ImageSize,
        on_images: Callable[[int], Any] = lambda count: None,
    ) -> None:
        """Fill in the candidates, which must be all candidates of their prompts.

        Args:
            embeds: conditioning of the prompts.
            size: of their images.
            on_images: called with the number of candidates that were finished or rejected.
        """
        self.embeds = embeds
        self.prompts = prompts
        self.size = size
        self.on_images = on_images
        for group in embeds.groups([candidate.row for candidate in candidates]):
            self._sample_group([candidates[i] for i in group])

    def _sample_group(self, candidates: Sequence[Candidate]) -> None:
        """Fill in candidates that fit into one batch."""
        self.queues: list[deque[Candidate]] = [deque() for _ in self.stops]
        self.queues[0].extend(candidates)
        self.waiting: dict[tuple[int, int], list[tuple[Candidate, torch.Tensor]]] = {}
        while any(self.queues):
            segment = self._next_segment()
            batch, (latents, images) = self.sampler.run_with_oom_backoff(
                self.queues[segment], functools.partial(self._run, segment)
            )
            for candidate, latent, image in zip(batch, latents, images, strict=True):
                candidate.latents = latent
                candidate.stopped_at = self.stops[segment]
                if segment == len(self.stops) - 1:
                    candidate.image = encode_later(image.numpy())
                    candidate.would_stop_at = candidate.would_stop_at or candidate.stopped_at
                    self.on_images(1)
                else:
                    self._wait(candidate, image, segment)

    def _next_segment(self) -> int:
        """Return the last segment with a full micro-batch; if none has one, the first with any candidate."""
        full = [i for i, queue in enumerate(self.queues) if len(queue) >= self.sampler.batch_size]
        return full[-1] if full else next(i for i, queue in enumerate(self.queues) if queue)

    def _run(self, segment: int, batch: list[Candidate]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents at the segment's end, and pixels: previews at a checkpoint, images at the end."""
        settings = self.settings
        start = self.stops[segment - 1] if segment else 0
        rows = [candidate.row for candidate in batch]
        if segment:
            latents = torch.stack([candidate.latents for candidate in batch if candidate.latents is not None])
        else:
            generators = seeded(candidate.seed for candidate in batch)
            latents = self.sampler.noise(generators, self.size.height, self.size.width)
        latents, clean = self.sampler.advance(
            latents,
            self.embeds[rows],
            self.embeds.negative(rows),
            range(start, self.stops[segment]),
            settings,
        )
        if segment == len(self.stops) - 1:
            latents = latents.half()
            return latents, self.sampler.decode(latents)
        assert clean is not None, "schedulers without history give the expected clean latents"
        size = [max(1, side // self.rules.preview_scale) for side in clean.shape[-2:]]
        return latents, self.sampler.decode(torch.nn.functional.interpolate(clean, size, mode="area"))

    def _wait(self, candidate: Candidate, preview: torch.Tensor, segment: int) -> None:
        """Keep a candidate at a checkpoint until all candidates of its prompt are there, then decide."""
        group = self.waiting.setdefault((segment, candidate.row), [])
        group.append((candidate, preview))
        alone = segment == 0 or candidate.audited
        expected = self.settings.candidates_per_prompt if alone else self.rules.checkpoints[segment - 1].keep
        if len(group) < expected:
            return
        group = sorted(self.waiting.pop((segment, candidate.row)), key=lambda pair: pair[0].index)
        scores = self._scores(torch.stack([preview for _, preview in group]), self.prompts[candidate.row])
        for (one, _), score in zip(group, scores, strict=True):
            one.preview_scores.append(score)
        running = [one for one, _ in group if one.would_stop_at is None]
        best = survivors([one.preview_scores[-1] for one in running], self.rules.checkpoints[segment].keep)
        for rejected in set(range(len(running))) - set(best):
            running[rejected].would_stop_at = self.stops[segment]
        for one, _ in group:
            if one.would_stop_at is None or one.audited:
                self.queues[segment + 1].append(one)
            else:
                one.latents = None
                self.on_images(1)

    def _scores(self, previews: torch.Tensor, prompt: str) -> list[float]:
        """Return the scores of one prompt's previews, NaN for a flat one. Batches depend on their number only."""
        all_scores: list[float] = []
        for part in previews.permute(0, 3, 1, 2).split(BATCH):
            scores = self.reward.score(part, [prompt] * len(part))
            all_scores += scores.masked_fill(is_flat(part), float("nan")).tolist()
        return all_scores
