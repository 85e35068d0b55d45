"""Stage `train`: fine-tuning on the winners' latents, without VAE and, unless they are trained, text encoders."""

from __future__ import annotations

import csv
import logging
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from srpo.errors import UserError
from srpo.lineage.code import import_closure_digest
from srpo.lineage.record import check_base, write_lineage
from srpo.models.fp8 import store_in_fp8
from srpo.models.tokenizer import load_tokenizer, warn_of_cut_prompts
from srpo.rounds import Round, RoundFiles
from srpo.runtime import distributed
from srpo.runtime.device import pick_device, pick_dtype
from srpo.runtime.extras import require
from srpo.runtime.inputs import model_inputs
from srpo.runtime.progress import OnStep
from srpo.runtime.turns import TURNS
from srpo.sampling.conditioning import time_ids
from srpo.sampling.prompt_cache import StoredEmbeds
from srpo.sampling.sampler import Sampler
from srpo.storage.files import publish
from srpo.storage.hashing import digest
from srpo.storage.scratch import scratch_folder
from srpo.training.dataset import Winners, load_winners, winners_digests
from srpo.training.loop import TrainingLoop
from srpo.training.losses import Loss, make_loss
from srpo.training.model import TextEncoders, make_trainable
from srpo.training.noise_schedule import make_noise_schedule
from srpo.training.prompt_tokens import PromptTokens

log = logging.getLogger(__name__)


def train(round: Round, on_step: OnStep = lambda metrics, step: None) -> None:
    """Write `rounds/<key>/adapter/` and `rounds/<key>/training.csv`, in the processes or cluster of `runtime`.

    A killed run resumes at its last checkpoint and ends with the same bytes. With several processes (`RANK` and
    `WORLD_SIZE` in the environment) each computes its share of every batch, and the first one writes.

    Args:
        on_step: called after each optimizer step with loss, learning_rate, grad_norm, for a loss on pairs also
            `losses.pair_metrics`, and the step from 1; after a resume for the steps before it, too.

    Raises:
        UserError: there are no winners, the parent's adapter does not fit, or the loss diverged.
    """
    settings = round.params.train
    files = round.files
    runtime = round.params.runtime
    if runtime.cluster and not distributed.is_worker():
        require("ray", "runtime.cluster")
        from srpo.runtime.gang import Gang, run_gang

        pattern = f".srpo/scratch/train@{round.key}-*/state-*.safetensors"
        gang = Gang(round, "train", train, lambda: _read(round, pattern), pattern, [files.training, files.adapter])
        run_gang(gang, runtime.processes, on_step)
        return
    if not distributed.is_worker():
        check_base(round.root)
    if distributed.is_parent(runtime):
        distributed.run(lambda: ["train", round.key], runtime.processes)
        return
    if round.params.runtime.dtype == "float16":
        raise UserError("runtime.dtype: gradients underflow in float16; train in bfloat16 or float32")
    accelerator = Accelerator(cpu=pick_device(round.params.runtime).type == "cpu", mixed_precision="no")
    if accelerator.num_processes > settings.batch_size:
        raise UserError(
            f"runtime.processes: {accelerator.num_processes} can't share a batch of {settings.batch_size};"
            " use fewer processes or a larger train.batch_size"
        )
    loss = make_loss(settings)
    inputs = _inputs_found_once(round, accelerator)
    winners = load_winners(round, inputs["winners"], pairs=loss.pairs)
    if accelerator.is_main_process:
        tokenizer = load_tokenizer(round.params.model, round.root)
        warn_of_cut_prompts("train", ((repr(text[:40]), text) for text in winners.prompts), round, tokenizer)
    loop = _prepare(round, winners, loss, accelerator)
    with accelerator.main_process_first():
        scratch = scratch_folder(round.root, "train", round.key, inputs)
    history = loop.run(scratch, on_step)
    if accelerator.is_main_process:
        adapter = scratch / "adapter"
        curve = scratch / files.training.name
        shutil.rmtree(adapter, ignore_errors=True)
        loop.model.save(adapter)
        write_lineage(adapter, round, inputs["winners"])
        with curve.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(history[0]))
            writer.writeheader()
            writer.writerows(history)
        publish(curve, files.training)
        publish(adapter, files.adapter)
        shutil.rmtree(scratch)
        last = [row["loss"] for row in history[-20:]]
        log.info(
            "train %s: %d steps on %d winners, loss %.4f",
            *(round.key, len(history), len(winners), sum(last) / len(last)),
        )
    accelerator.wait_for_everyone()


def _read(round: Round, checkpoints: str) -> list[Path]:
    """Return the files and folders of the project that a training reads."""
    paths = [*model_inputs(round), round.parent_files.adapter, *round.root.glob(checkpoints)]
    folders = (RoundFiles(round.root, key).winners for key in (*round.ancestors, round.key))
    return paths + [folder for folder in folders if folder.exists()]


def _inputs_found_once(round: Round, accelerator: Accelerator) -> dict:
    """Return what `_inputs` returns in the first process: winners may be tens of GB, and all would hash them."""
    found = [_inputs(round) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def _inputs(round: Round) -> dict:
    """Return what an interrupted run must have in common with this one, so that its checkpoints are used."""
    return {
        "seed": round.params.seed,
        "model": round.params.model.model_dump(),
        "train": round.params.train.model_dump(),
        "winners": winners_digests(round),
        "parent": digest(round.parent_files.adapter),
        "code": import_closure_digest("srpo.stages.train"),
    }


def _prepare(round: Round, winners: Winners, loss: Loss, accelerator: Accelerator) -> TrainingLoop:
    settings = round.params.train
    params = round.params
    if settings.method == "full":  # float32 weights; autocast chooses the compute dtype in every pass
        params = round.params.model_copy(
            update={"runtime": round.params.runtime.model_copy(update={"dtype": "float32"})}
        )
    sampler = Sampler(params)
    dtype = pick_dtype(round.params.runtime, sampler.device)
    encoders: TextEncoders | None = None
    texts: StoredEmbeds | PromptTokens
    if settings.train_text_encoder:
        pipeline = sampler.text_pipeline
        encoders = TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2)
        texts = PromptTokens(pipeline, winners.prompts, chunked=params.model.long_prompts == "chunk")
    else:
        texts = StoredEmbeds(sampler, winners.prompts, round.root)
        sampler.release_text_encoders()
    TURNS.bring([sampler.unet, *(encoders or ())], sampler.device)  # with runtime.offload they are not there yet
    model = make_trainable(sampler.unet, round, with_reference=loss.pairs, dtype=dtype, encoders=encoders)
    if params.model.fp8 and sampler.device.type == "cuda":
        store_in_fp8(sampler.unet)
    return TrainingLoop(
        accelerator=accelerator,
        model=model,
        loss=loss,
        winners=winners,
        texts=texts,
        time_ids=partial(_time_ids, sampler.pipeline.vae_scale_factor, sampler.device, sampler.unet.dtype),
        schedule=make_noise_schedule(sampler.pipeline.scheduler),
        settings=settings,
        runtime=round.params.runtime,
        seed=(round.params.seed, round.key),
        device=sampler.device,
        dtype=dtype,
    )


def _time_ids(factor: int, device: torch.device, dtype: torch.dtype, height: int, width: int) -> torch.Tensor:
    """Return the size conditioning of latents; a function of its own, so that the loop does not keep the VAE."""
    return time_ids(height * factor, width * factor, device, dtype)
