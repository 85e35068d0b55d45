"""A base of the EDM kind through all stages that use it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import torch
from diffusers import EDMDPMSolverMultistepScheduler, StableDiffusionXLPipeline

from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.lineage.record import WEIGHTS_FILE
from srpo.models.pipeline import load_pipeline
from srpo.preflight.models import check_models
from srpo.rounds import Round, RoundFiles
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.train import train
from tests.training.helpers import started, with_train


def test_every_stage_works_on_an_edm_base(world: Path) -> None:
    base = world / "data" / "base"
    pipeline = load_pipeline(load_params().model, torch.float32)
    pipeline.scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    pipeline.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.3] * 4, scaling_factor=0.5)
    pipeline.save_pretrained(base)
    params = started(world)

    row = next(iter(parquet.read_rows(RoundFiles(world, "001").candidates)))
    plain = StableDiffusionXLPipeline.from_pretrained(base)
    plain.set_progress_bar_config(disable=True)
    wanted = plain(
        row["prompt"], num_inference_steps=row["steps"], guidance_scale=row["guidance"], height=32, width=32,
        generator=torch.Generator().manual_seed(row["seed"]),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(wanted).astype(int) - np.asarray(decode_image(row["image"]))).max() <= 1

    train(Round.of(params, world, "001"))
    files = RoundFiles(world, "001")
    assert pl.read_csv(files.training)["loss"].is_finite().all()
    plain.load_lora_weights(files.adapter, weight_name=WEIGHTS_FILE)
    for key in ("base", "001"):
        evaluate(Round.of(params, world, key))
    assert json.loads((files.evaluation / "drift.json").read_text())["drift"] > 0


def test_min_snr_on_an_edm_base_fails_the_check(world: Path) -> None:
    file = world / "data" / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    pin_base(Round.of(load_params(), world, "base"))
    params = with_train(load_params(), snr_gamma=5.0)
    failed = [result for result in check_models(params, world) if result.state == "fail"]
    assert [(result.name, "EDM kind" in result.text) for result in failed] == [("train.snr_gamma", True)]
