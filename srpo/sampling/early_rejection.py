"""Candidates on their way from noise to picture, some of them given up at checkpoints.

The way is cut into segments at the checkpoints. Each segment has a queue, and survivors of several prompts wait there
until they fill a micro-batch, so that the device stays full; at the end all queues are emptied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from srpo.config.schema import EarlyRejectionParams, GenerateParams
from srpo.data.candidate import Candidate
from srpo.errors import UserError
from srpo.rewards.batches import BATCH, is_flat
from srpo.rewards.protocol import Reward
from srpo.sampling.conditioning import PromptEmbeds
from srpo.sampling.sampler import Sampler
from srpo.selection.audit import survivors

# those that keep nothing from step to step but its number, and draw no random numbers
MEMORYLESS = ("EulerDiscreteScheduler", "DDIMScheduler")


class EarlyRejection:
    """Samples candidates and gives up those whose previews score low."""

    def __init__(self, sampler: Sampler, settings: GenerateParams, reward: Reward) -> None:
        """Raises:
        UserError: the base model's scheduler keeps history, which is lost where a way is cut.
        """
        scheduler = type(sampler.pipeline.scheduler).__name__
        if scheduler not in MEMORYLESS:
            raise UserError(
                f"generate.early_rejection: the base model's {scheduler} keeps history between steps or draws noise;"
                f" use a base with {' or '.join(MEMORYLESS)}, or set early_rejection to null"
            )
        self.sampler, self.settings, self.reward = sampler, settings, reward
        self.rules: EarlyRejectionParams = settings.early_rejection
        self.stops = [*(point.step for point in self.rules.checkpoints), settings.num_inference_steps]

    def sample(
        self,
        embeds: PromptEmbeds,
        prompts: Sequence[str],
        candidates: Sequence[Candidate],
        on_images: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Fill in the candidates, which must be all of their prompts'. Results do not depend on the batch size.

        Args:
            embeds: from `Sampler.encode(prompts)`.
            on_images: called with the number of candidates that were finished or given up.
        """
        self.embeds, self.prompts, self.on_images = embeds, prompts, on_images
        self.queues: list[deque[Candidate]] = [deque() for _ in self.stops]
        self.queues[0].extend(candidates)
        self.waiting: dict[tuple[int, int], list[tuple[Candidate, torch.Tensor]]] = {}
        while any(self.queues):
            segment = self._next_segment()
            batch, (latents, pictures) = self.sampler.fitting(
                self.queues[segment], lambda b, s=segment: self._run(b, s)
            )
            for candidate, latent, picture in zip(batch, latents, pictures, strict=True):
                candidate.latents, candidate.stopped_at = latent, self.stops[segment]
                if segment == len(self.stops) - 1:
                    candidate.image = picture.numpy()
                    candidate.would_stop_at = candidate.would_stop_at or candidate.stopped_at
                    self.on_images(1)
                else:
                    self._arrive(candidate, picture, segment)

    def _next_segment(self) -> int:
        """The last one with a full micro-batch; when none has, the first that has anything."""
        full = [i for i, queue in enumerate(self.queues) if len(queue) >= self.sampler.batch_size]
        return full[-1] if full else next(i for i, queue in enumerate(self.queues) if queue)

    def _run(self, batch: list[Candidate], segment: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents at the segment's end, and pixels: previews at a checkpoint, pictures at the end."""
        settings, start = self.settings, self.stops[segment - 1] if segment else 0
        if segment:
            latents = torch.stack([candidate.latents for candidate in batch])
        else:
            latents = self.sampler.noise([candidate.seed for candidate in batch], settings.height, settings.width)
        latents, clean = self.sampler.advance(
            latents,
            self.embeds[[candidate.row for candidate in batch]],
            self.embeds[[-1]],
            range(start, self.stops[segment]),
            settings.num_inference_steps,
            settings.guidance_scale,
        )
        if segment == len(self.stops) - 1:
            latents = latents.half()
            return latents, self.sampler.decode(latents)
        size = [max(1, side // self.rules.preview_scale) for side in clean.shape[-2:]]
        return latents, self.sampler.decode(torch.nn.functional.interpolate(clean, size, mode="area"))

    def _arrive(self, candidate: Candidate, preview: torch.Tensor, segment: int) -> None:
        """Wait at a checkpoint for the prompt's others; the last one to come brings the decision."""
        here = self.waiting.setdefault((segment, candidate.row), [])
        here.append((candidate, preview))
        alone = segment == 0 or candidate.audited
        expected = self.settings.candidates_per_prompt if alone else self.rules.checkpoints[segment - 1].keep
        if len(here) < expected:
            return
        here = sorted(self.waiting.pop((segment, candidate.row)), key=lambda pair: pair[0].index)
        scores = self._scores(torch.stack([picture for _, picture in here]), self.prompts[candidate.row])
        for (one, _), score in zip(here, scores, strict=True):
            one.preview_scores.append(score)
        running = [one for one, _ in here if one.would_stop_at is None]
        best = survivors([one.preview_scores[-1] for one in running], self.rules.checkpoints[segment].keep)
        for lost in set(range(len(running))) - set(best):
            running[lost].would_stop_at = self.stops[segment]
        for one, _ in here:
            if one.would_stop_at is None or one.audited:
                self.queues[segment + 1].append(one)
            else:
                one.latents = None
                self.on_images(1)

    def _scores(self, pictures: torch.Tensor, prompt: str) -> list[float]:
        """Of one prompt's previews, in batches that nothing but their number decides; NaN for a flat one."""
        found: list[float] = []
        for part in pictures.permute(0, 3, 1, 2).split(BATCH):
            scores = self.reward.score(part, [prompt] * len(part))
            found += scores.masked_fill(is_flat(part), float("nan")).tolist()
        return found
