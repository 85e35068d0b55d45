"""Stage `train`: fine-tuning on the winners' latents. No VAE and no text encoder inside the loop."""

from __future__ import annotations

import csv
import logging
import shutil

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from srpo.errors import UserError
from srpo.lineage.record import check_base, write_lineage
from srpo.models.adapters import make_trainee
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.device import pick_device, pick_dtype
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler
from srpo.storage.files import publish
from srpo.storage.hashing import code_digest, digest
from srpo.storage.scratch import scratch_folder
from srpo.training.dataset import Winners, load_winners
from srpo.training.loop import OnStep, TrainingLoop
from srpo.training.losses import Objective, make_objective

log = logging.getLogger("srpo")
FIELDS = ["step", "loss", "learning_rate", "grad_norm"]


def train(round: Round, on_step: OnStep = lambda metrics, step: None) -> None:
    """Write `rounds/<key>/adapter/` and `rounds/<key>/training.csv`.

    A killed run goes on at its last state and ends with the same bytes. Among several processes (`RANK` and
    `WORLD_SIZE` in the environment) each computes its share of every batch, and the first writes.

    Args:
        on_step: called after each optimizer step with loss, learning_rate and grad_norm, and the step from 1; after
            a resume for the steps before it, too.

    Raises:
        UserError: no winners, a parent adapter that does not fit, or a loss that went astray.
    """
    settings, files = round.params.train, round.files
    if distributed.is_parent(round.params.runtime):
        distributed.run(lambda: ["train", round.key], round.params.runtime.processes)
        return
    accelerator = Accelerator(cpu=pick_device(round.params.runtime).type == "cpu", mixed_precision="no")
    if accelerator.num_processes > settings.batch_size:
        raise UserError(
            f"runtime.processes: {accelerator.num_processes} can't share a batch of {settings.batch_size};"
            " have fewer processes or a larger train.batch_size"
        )
    objective = make_objective(settings)
    winners = load_winners(round, pairs=objective.pairs)
    loop = _prepare(round, winners, objective, accelerator)
    with accelerator.main_process_first():
        scratch = scratch_folder(round.root, "train", round.key, _inputs(round, winners))
    history = loop.run(scratch, on_step)
    if accelerator.is_main_process:
        adapter, curve = scratch / "adapter", scratch / files.training.name
        shutil.rmtree(adapter, ignore_errors=True)
        loop.trainee.save(adapter)
        write_lineage(adapter, round, winners.digests)
        with curve.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=FIELDS)
            writer.writeheader()
            writer.writerows(history)
        publish(curve, files.training)
        publish(adapter, files.adapter)
        shutil.rmtree(scratch)
        last = [row["loss"] for row in history[-20:]]
        count = len(winners.latents)
        log.info("train %s: %d steps on %d winners, loss %.4f", round.key, len(history), count, sum(last) / len(last))
    accelerator.wait_for_everyone()


def _inputs(round: Round, winners: Winners) -> dict:
    """What a state of an interrupted run must have in common with this one."""
    return {
        "seed": round.params.seed,
        "model": round.params.model.model_dump(),
        "train": round.params.train.model_dump(),
        "winners": winners.digests,
        "parent": digest(round.parent_files.adapter),
        "code": code_digest(),
    }


def _prepare(round: Round, winners: Winners, objective: Objective, accelerator: Accelerator) -> TrainingLoop:
    settings, sampling = round.params.train, round.params
    if settings.method == "full":  # float32 weights, and what is computed in is chosen pass by pass
        sampling = round.params.model_copy(
            update={"runtime": round.params.runtime.model_copy(update={"dtype": "float32"})}
        )
    check_base(round.root)
    sampler = Sampler(sampling)
    dtype = pick_dtype(round.params.runtime, sampler.device)
    distinct = sorted(set(winners.prompts))
    position = {prompt: row for row, prompt in enumerate(distinct)}
    return TrainingLoop(
        accelerator=accelerator,
        trainee=make_trainee(sampler.unet, round, keep=objective.pairs, dtype=dtype),
        objective=objective,
        winners=winners,
        embeds=prompt_embeds(sampler, distinct, round.root),
        rows=torch.tensor([position[prompt] for prompt in winners.prompts]),
        time_ids=sampler.time_ids(*winners.latents.shape[-2:]),
        schedule=DDPMScheduler.from_config(sampler.pipeline.scheduler.config),
        settings=settings,
        runtime=round.params.runtime,
        seed=(round.params.seed, round.key),
        device=sampler.device,
        dtype=dtype,
    )
