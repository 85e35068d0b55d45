"""Stage `generate`: N candidates for every train prompt that the round draws, from the parent round's model.

A unit of work is one shard of the prompts, which becomes one parquet file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.contrib.logging import logging_redirect_tqdm

from srpo.data import parquet
from srpo.data.candidate import Candidate
from srpo.data.images import encode_later
from srpo.data.prompt_draw import Draw, draw_prompts
from srpo.data.prompts import Prompt, check_disjoint, load_prompts, named_texts, negative_prompts
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.errors import UserError
from srpo.lineage.record import check_base, require_weights
from srpo.models.tokenizer import load_tokenizer, text_read, warn_of_cut_prompts
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.inputs import model_inputs, reward_inputs
from srpo.runtime.make_units import make_units
from srpo.runtime.progress import image_progress
from srpo.runtime.units import Make, Units, unfinished
from srpo.selection.audit import is_audited
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed, digest
from srpo.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from srpo.sampling.early_rejection import EarlyRejection
    from srpo.sampling.sampler import Sampler

log = logging.getLogger(__name__)


def generate(round: Round) -> None:
    """Write `rounds/<key>/candidates/`, one parquet shard per `prompts_per_shard` prompts.

    Shards that an interrupted run finished are kept. With `runtime.processes` above 1 this process starts workers that
    share the others. With `generate.candidates` images from elsewhere are encoded instead.

    Raises:
        UserError: bad prompt files, or a model that can't be loaded or used.
    """
    if round.params.generate.candidates:
        from srpo.sampling.encoding import encode_candidates

        encode_candidates(round)
        return
    scratch, shards = _plan(round)
    paths = [scratch / name for name in shards]
    inputs = [*model_inputs(round), round.parent_files.adapter]
    if rules := round.params.generate.early_rejection:
        inputs += [*reward_inputs(round, [rules.reward]), round.base_files.preview]
    left = sum(len(shards[path.name]) for path in unfinished(paths)) * round.params.generate.candidates_per_prompt
    check = partial(check_base, round.root)
    make_units(Units(round, "generate", paths, partial(_load, shards, left), inputs, check=check))
    if not distributed.is_worker():
        publish(scratch, round.files.candidates)


@contextmanager
def _load(shards: Mapping[str, Sequence[Prompt]], left: int, round: Round) -> Iterator[Make]:
    """Load the models.

    Args:
        shards: the prompts of each unit, by its name.
        left: images that are still to be made, for the progress bar.
    """
    from srpo.sampling.sampler import Sampler

    sampler = Sampler(round.params, round.parent_files.adapter, fast=True)
    _encode_prompts(round, sampler, list(shards.values()))
    rejection = _load_rejection(round, sampler)
    # the redirection keeps log lines out of the bar
    with logging_redirect_tqdm(), image_progress(f"generate {round.key}", left) as progress:

        def make(unit: Path) -> None:
            prompts = shards[unit.name]
            _write(round, unit, prompts, _sample(round, prompts, sampler, rejection, progress.update))

        yield make


def _plan(round: Round) -> tuple[Path, dict[str, list[Prompt]]]:
    """Check the inputs, and return the scratch folder and by name the prompts of its shards, finished or not."""
    params = round.params
    settings = params.generate
    pool = load_prompts(round.root / params.prompts.train)
    tokenizer = load_tokenizer(params.model, round.root)
    check_disjoint(pool, load_prompts(round.root / params.prompts.eval), text_read(params.model, tokenizer))
    require_weights(round.parent_files)
    prompts = draw_prompts(pool, [Draw(own.prompts_per_round, own.tags) for own in round.generate_of_path], params.seed)
    if not prompts:
        raise UserError(f"rounds.{round.key}.generate.tags: no prompt of {params.prompts.train} has them; change tags")
    if not distributed.is_worker():
        warn_of_cut_prompts("generate", named_texts(prompts, round.params.generate.negative_prompt), round, tokenizer)
    inputs = {
        "seed": params.seed,
        "model": params.model.model_dump(),
        "generate": settings.model_dump(),
        "prompts": [vars(prompt) for prompt in prompts],
        "adapter": digest(round.parent_files.adapter),
    }
    if settings.early_rejection:
        inputs["preview"] = digest(round.base_files.preview)
    scratch = scratch_folder(round.root, "generate", round.key, inputs)
    size = settings.prompts_per_shard
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return scratch, {f"shard-{number:05d}-of-{len(parts):05d}.parquet": part for number, part in enumerate(parts)}


def _load_rejection(round: Round, sampler: Sampler) -> EarlyRejection | None:
    """Load the reward that scores previews, if there is early rejection."""
    from srpo.rewards.loading import load_rewards
    from srpo.sampling.early_rejection import EarlyRejection

    params = round.params
    rules = params.generate.early_rejection
    if rules is None:
        return None
    rewards = load_rewards({rules.reward: params.rewards[rules.reward]}, params.runtime, round.root)
    return EarlyRejection(sampler, params.generate, rewards[rules.reward])


def _encode_prompts(round: Round, sampler: Sampler, parts: Sequence[Sequence[Prompt]]) -> None:
    """Encode all prompts before the first image, so that text encoders need no memory after it.

    Processes begin at different shards, and find those of the others in the cache.
    """
    from srpo.sampling.prompt_cache import encode_ahead

    own = len(parts) * distributed.rank() // distributed.world_size()
    groups = [_texts(round, part) for part in (*parts[own:], *parts[:own])]
    encode_ahead(sampler, groups, round.root)


def _texts(round: Round, prompts: Sequence[Prompt]) -> tuple[list[str], Sequence[str | None]]:
    """Return texts and negative prompts."""
    return [prompt.prompt for prompt in prompts], negative_prompts(prompts, round.params.generate.negative_prompt)


def _sample(
    round: Round,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    rejection: EarlyRejection | None,
    on_images: Callable[[int], Any],
) -> list[Candidate]:
    """Return all candidates of these prompts."""
    from srpo.sampling.prompt_cache import prompt_embeds
    from srpo.sampling.sampler import sample_batches
    from srpo.sampling.sizes import of_size, rows_by_size

    settings = round.params.generate
    texts, negatives = _texts(round, prompts)
    embeds = prompt_embeds(sampler, texts, round.root, negatives)
    candidates = [
        _seeded(round, prompt, row, index)
        for row, prompt in enumerate(prompts)
        for index in range(settings.candidates_per_prompt)
    ]
    for size, rows in rows_by_size(prompts, settings).items():
        group = [candidate for candidate in candidates if candidate.row in rows]
        if rejection:
            rejection.sample(embeds, texts, group, size, on_images)
            continue
        rows = [candidate.row for candidate in group]
        seeds = [candidate.seed for candidate in group]
        for numbers, latents, images in sample_batches(sampler, embeds, rows, seeds, of_size(settings, size)):
            for number, latent, image in zip(numbers, latents, images, strict=True):
                candidate = group[number]
                candidate.latents = latent
                candidate.image = encode_later(image.numpy())  # while the device makes the next ones
                candidate.stopped_at = candidate.would_stop_at = settings.num_inference_steps
            on_images(len(numbers))
    return candidates


def _seeded(round: Round, prompt: Prompt, row: int, index: int) -> Candidate:
    """Return a candidate that is still to be sampled."""
    seed = round.params.seed
    rules = round.params.generate.early_rejection
    audited = rules is not None and is_audited(rules.audit_fraction, seed, round.key, prompt.id)
    return Candidate(row, index, derive_seed(seed, round.key, prompt.id, index), audited=audited)


def _write(round: Round, unit: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> None:
    rows = [_row(round, prompts[candidate.row], candidate) for candidate in candidates]
    parquet.write_table(unit, rows, CANDIDATE_FIELDS)
    rejected = sum(candidate.image is None for candidate in candidates)
    suffix = f", {rejected} of them rejected early" if rejected else ""
    log.info("generate %s: wrote %s, %d candidates%s", round.key, unit.name, len(rows), suffix)


def _row(round: Round, prompt: Prompt, candidate: Candidate) -> dict[str, Any]:
    latents = candidate.latents
    return {
        "candidate_id": f"{round.key}-{prompt.id}-{candidate.index:04d}",
        "prompt_id": prompt.id,
        "prompt": prompt.prompt,
        "index": candidate.index,
        "seed": candidate.seed,
        "image": None if candidate.image is None else candidate.image.result(),
        "latents": None if latents is None else parquet.latents_bytes(latents.numpy()),
        "latents_shape": None if latents is None else list(latents.shape),
        "steps": round.params.generate.num_inference_steps,
        "guidance": round.params.generate.guidance_scale,
        "preview_scores": candidate.preview_scores,
        "stopped_at": candidate.stopped_at,
        "would_stop_at": candidate.would_stop_at,
        "audited": candidate.audited,
    }
