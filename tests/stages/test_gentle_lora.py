"""In 16 bits a gentle LoRA is at work in the stages that sample: what is sampled is what was trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.rounds import Round, RoundFiles
from srpo.stages.evaluate import evaluate
from srpo.stages.generate import generate
from tests.models.test_merging import write_adapter
from tests.training.helpers import started, with_runtime


def latents(root: Path, key: str) -> np.ndarray:
    rows = parquet.read_rows(RoundFiles(root, key).candidates, ["latents"])
    return np.stack([np.frombuffer(row["latents"], "<f2").astype(np.float64) for row in rows])


@pytest.mark.slow
def test_a_gentle_lora_is_at_work_in_16_bits(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "srpo")
    params: Params = started(world)
    files = RoundFiles(world, "001")
    write_adapter(params, files.adapter, 0.001)
    (files.adapter / "lineage.json").write_text("{}")
    sixteen = with_runtime(params, dtype="bfloat16")
    generate(Round.of(sixteen, world, "002"))
    assert "kept beside the weights" in caplog.text and "merged into bfloat16 weights" not in caplog.text
    tuned = latents(world, "002")
    write_adapter(params, files.adapter, 0.0)
    generate(Round.of(sixteen, world, "002"))
    assert np.abs(tuned - latents(world, "002")).mean() > 0
    write_adapter(params, files.adapter, 0.001)
    for key in ("base", "001"):
        evaluate(Round.of(sixteen, world, key))
    assert caplog.text.count("kept beside the weights") >= 2
    assert json.loads((files.evaluation / "drift.json").read_text())["drift"] > 0
