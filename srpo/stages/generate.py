"""Stage `generate`: N candidates for every train prompt, from the parent round's model.

The prompts are cut into shards, each made on its own by whatever process; what is finished is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from srpo.data import parquet
from srpo.data.images import encode_images
from srpo.data.prompts import Prompt, check_disjoint, load_prompts
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.lineage.record import check_base, require_weights
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.background import Background
from srpo.selection.audit import is_audited
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed, digest
from srpo.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from srpo.data.candidate import Candidate
    from srpo.sampling.early_rejection import EarlyRejection

log = logging.getLogger("srpo")


def generate(round: Round, numbers: Sequence[int] | None = None) -> None:
    """Write `rounds/<key>/candidates/`, one parquet shard per `prompts_per_shard` prompts.

    A shard that an interrupted run finished is kept. With `runtime.processes` above 1 this process starts workers
    that share the unfinished shards.

    Args:
        numbers: of a worker only: the shards that all workers share.

    Raises:
        UserError: bad prompt files, or a model that can't be loaded or used.
    """
    shards = Shards(round)
    if distributed.is_parent(round.params.runtime) and shards.unfinished():
        distributed.run(
            lambda: ["generate", round.key, "--shards", ",".join(map(str, shards.unfinished()))],
            min(round.params.runtime.processes, len(shards.unfinished())),
            attempts=3,
        )
    else:
        shards.make(numbers)
    if not distributed.is_worker():
        shards.publish()


class Shards:
    """The shards of a round's candidates."""

    def __init__(self, round: Round) -> None:
        """
        Raises:
            UserError: bad prompt files, or a parent without an adapter.
        """
        self.params, self.root, self.key = round.params, round.root, round.key
        self.settings = round.params.generate
        self.files, self.parent = round.files, round.parent_files
        prompts = load_prompts(round.root / round.params.prompts.train)
        check_disjoint(prompts, load_prompts(round.root / round.params.prompts.eval))
        require_weights(round.parent_files)
        inputs = {
            "seed": round.params.seed,
            "model": round.params.model.model_dump(),
            "generate": self.settings.model_dump(),
            "prompts": [vars(prompt) for prompt in prompts],
            "adapter": digest(self.parent.adapter),
        }
        if self.settings.early_rejection:
            inputs["preview"] = digest(round.base_files.preview)
        self.scratch = scratch_folder(round.root, "generate", round.key, inputs)
        size = self.settings.prompts_per_shard
        self.parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        self.paths = [
            self.scratch / f"shard-{number:05d}-of-{len(self.parts):05d}.parquet" for number in range(len(self.parts))
        ]

    def unfinished(self) -> list[int]:
        """The numbers of the shards that are still to be made."""
        return [number for number, path in enumerate(self.paths) if not path.exists()]

    def make(self, numbers: Sequence[int] | None = None) -> None:
        """Make this process's share of these shards (of all unless given), every n-th where n processes share them.

        All processes must be given the same numbers.

        Raises:
            UserError: a model can't be loaded or used.
        """
        shared = range(len(self.paths)) if numbers is None else numbers
        mine = [
            number
            for number in shared[distributed.rank() :: distributed.world_size()]
            if not self.paths[number].exists()
        ]
        if not mine:
            return
        make = self._maker()
        total = sum(len(self.parts[number]) for number in mine) * self.settings.candidates_per_prompt
        share = f" (1 of {distributed.world_size()} processes)" if distributed.world_size() > 1 else ""
        bar = tqdm(
            total=total, unit="img", desc=f"generate {self.key}{share}", mininterval=2, disable=distributed.rank() > 0
        )
        # else the line of a shard is printed into the bar
        with logging_redirect_tqdm(), bar, Background() as writer:
            for number in mine:
                candidates = make(self.parts[number], bar.update)
                writer.submit(lambda number=number, candidates=candidates: self._write(number, candidates))

    def publish(self) -> None:
        """Move the finished shards to the round's candidates."""
        publish(self.scratch, self.files.candidates)

    def _maker(self) -> Callable[[list[Prompt], Callable[[int], Any]], list[Candidate]]:
        """Load what makes a shard, and return what does."""
        from srpo.rewards.loading import load_rewards
        from srpo.sampling.early_rejection import EarlyRejection
        from srpo.sampling.prompt_cache import prompt_embeds
        from srpo.sampling.sampler import Sampler

        check_base(self.root)
        settings, rejection = self.settings, None
        sampler = Sampler(self.params, self.parent.adapter, fast=True)
        if rules := settings.early_rejection:
            rewards = load_rewards({rules.reward: self.params.rewards[rules.reward]}, self.params.runtime, self.root)
            rejection = EarlyRejection(sampler, settings, rewards[rules.reward])

        def make(prompts: list[Prompt], on_images: Callable[[int], Any]) -> list[Candidate]:
            texts = [prompt.prompt for prompt in prompts]
            candidates = self._planned(prompts)
            self._sample(sampler, rejection, prompt_embeds(sampler, texts, self.root), texts, candidates, on_images)
            return candidates

        return make

    def _planned(self, prompts: list[Prompt]) -> list[Candidate]:
        from srpo.data.candidate import Candidate

        rules, seed = self.settings.early_rejection, self.params.seed
        return [
            Candidate(
                row,
                index,
                derive_seed(seed, self.key, prompt.id, index),
                audited=bool(rules) and is_audited(rules.audit_fraction, seed, self.key, prompt.id),
            )
            for row, prompt in enumerate(prompts)
            for index in range(self.settings.candidates_per_prompt)
        ]

    def _sample(self, sampler, rejection: EarlyRejection | None, embeds, texts, candidates, on_images) -> None:
        if rejection:
            rejection.sample(embeds, texts, candidates, on_images)
            return
        from srpo.sampling.sampler import sample_images

        settings = self.settings
        latents, images = sample_images(
            sampler,
            embeds,
            [candidate.row for candidate in candidates],
            [candidate.seed for candidate in candidates],
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            on_images=on_images,
        )
        for candidate, latent, image in zip(candidates, latents, images, strict=True):
            candidate.latents, candidate.image = latent, image.numpy()
            candidate.stopped_at = candidate.would_stop_at = settings.num_inference_steps

    def _write(self, number: int, candidates: Sequence[Candidate]) -> None:
        cells = iter(encode_images(candidate.image for candidate in candidates if candidate.image is not None))
        rows = [
            self._row(self.parts[number][candidate.row], candidate, None if candidate.image is None else next(cells))
            for candidate in candidates
        ]
        path = self.paths[number]
        parquet.write_table(path, rows, CANDIDATE_FIELDS)
        stopped = sum(candidate.image is None for candidate in candidates)
        also = f", {stopped} of them given up early" if stopped else ""
        log.info("generate %s: wrote %s, %d candidates%s", self.key, path.name, len(rows), also)

    def _row(self, prompt: Prompt, candidate: Candidate, cell: dict[str, Any] | None) -> dict[str, Any]:
        latents = candidate.latents
        return {
            "candidate_id": f"{self.key}-{prompt.id}-{candidate.index:04d}",
            "prompt_id": prompt.id,
            "prompt": prompt.prompt,
            "index": candidate.index,
            "seed": candidate.seed,
            "image": cell,
            "latents": None if latents is None else parquet.latents_bytes(latents.numpy()),
            "latents_shape": None if latents is None else list(latents.shape),
            "steps": self.settings.num_inference_steps,
            "guidance": self.settings.guidance_scale,
            "preview_scores": candidate.preview_scores,
            "stopped_at": candidate.stopped_at,
            "would_stop_at": candidate.would_stop_at,
            "audited": candidate.audited,
        }
