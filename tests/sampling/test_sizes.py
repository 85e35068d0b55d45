"""Prompts of several sizes: each sampled, trained and evaluated at its own, whatever the batches."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from srpo import cli
from srpo.config.loader import load_params
from srpo.config.schema import ImageSize
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.data.prompts import Prompt, load_prompts
from srpo.errors import UserError
from srpo.lineage.record import WEIGHTS_FILE
from srpo.models.pipeline import load_pipeline
from srpo.preflight.data import check_prompts
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import seeded
from srpo.sampling.sizes import of_size, rows_by_size, size_of
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.gate import gate
from srpo.stages.generate import generate
from srpo.stages.report import report
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from tests.support.world import sampling_params

WIDE, TALL = (48, 32), (32, 64)
SIZES = "[{width: 48, height: 32}, {width: 32, height: 64}]"


@pytest.fixture
def root(world: Path) -> Path:
    """Train prompts of three sizes, two of them on their lines; without the judge of one size."""
    text = (world / "params.yaml").read_text()
    (world / "params.yaml").write_text("".join(x for x in text.splitlines(keepends=True) if "kind: templates" not in x))
    lines = [json.loads(line) for line in (world / "data/prompts/train.jsonl").read_text().splitlines()]
    for line, (width, height) in zip(lines[1:], (WIDE, TALL, WIDE), strict=False):
        line |= {"width": width, "height": height}
    (world / "data/prompts/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pin_base(Round.of(load_params(), world, "base"))
    return world


def set_keys(root: Path, section: str, text: str) -> None:
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace(f"\n{section}:\n", f"\n{section}:\n  {text}\n", 1))


def candidates(root: Path, batch_size: int) -> list[dict]:
    params = load_params()
    runtime = params.runtime.model_copy(update={"batch_size": batch_size})
    generate(Round.of(params.model_copy(update={"runtime": runtime}), root, "001"))
    return list(parquet.read_rows(RoundFiles(root, "001").candidates))


@pytest.mark.parametrize("rejecting", [False, True])
def test_each_prompt_has_its_size_in_any_batch(root: Path, rejecting: bool) -> None:
    if rejecting:
        set_keys(root, "generate", "early_rejection: {reward: reward, checkpoints: [{step: 1, keep: 2}]}")
        pin_base(Round.of(load_params(), root, "base"))
    rows = candidates(root, 16)
    assert rows == candidates(root, 2)
    sizes = [decode_image(row["image"]).size for row in rows if row["image"]]
    shapes = [tuple(row["latents_shape"]) for row in rows if row["image"]]
    assert list(dict.fromkeys(sizes)) == [(32, 32), WIDE, TALL]
    assert shapes == [(4, height // 8, width // 8) for width, height in sizes]


def test_images_equal_the_pipelines(root: Path) -> None:
    """The size conditioning is that of the image."""
    pipeline = load_pipeline(load_params().model, torch.float32)
    settings = load_params().generate
    for row in candidates(root, 16)[3::3]:
        _, height, width = row["latents_shape"]
        theirs = pipeline(
            row["prompt"],
            generator=seeded([row["seed"]])[0],
            num_inference_steps=row["steps"],
            guidance_scale=settings.guidance_scale,
            height=height * 8,
            width=width * 8,
            output_type="latent",
        ).images[0]
        ours = torch.from_numpy(parquet.latents_array(row).copy()).float()
        assert ((ours - theirs).abs().max() / theirs.std()).item() < 2e-3


def test_training_tells_the_unet_each_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass has one size; the adapter does not depend on how a batch is split, but for the order of sums."""
    for stage in (generate, score, select):
        stage(Round.of(load_params(), root, "001"))
    seen: list[tuple[tuple[int, ...], list[float]]] = []
    forward = UNet2DConditionModel.forward

    def watched(self, sample, *args, added_cond_kwargs, **kwargs):
        seen.append((tuple(sample.shape[-2:]), added_cond_kwargs["time_ids"].unique(dim=0).tolist()))
        return forward(self, sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    adapters = []
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", watched)
        for size in (4, 1):
            params = load_params()
            runtime = params.runtime.model_copy(update={"train_batch_size": size})
            train(Round.of(params.model_copy(update={"runtime": runtime}), root, "001"))
            adapters.append(load_file(RoundFiles(root, "001").adapter / WEIGHTS_FILE))
    assert {shape for shape, _ in seen} == {(4, 4), (4, 6), (8, 4)}
    for (height, width), ids in seen:
        assert ids == [[height * 8.0, width * 8.0, 0.0, 0.0, height * 8.0, width * 8.0]]
    for name, value in adapters[0].items():
        assert torch.allclose(value, adapters[1][name], atol=1e-4), name


@pytest.mark.slow
def test_a_whole_round_with_a_list_of_sizes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "srpo")
    set_keys(root, "evaluate", f"sizes: {SIZES}")
    evaluate(Round.of(load_params(), root, "base"))
    for stage in (generate, score, select, train, evaluate, gate, report):
        stage(Round.of(load_params(), root, "001"))
    assert "are evaluated" not in caplog.text, "training has the sizes of evaluation"
    rows = list(parquet.read_rows(RoundFiles(root, "001").evaluation / "samples.parquet"))
    sizes = {row["prompt_id"]: decode_image(row["image"]).size for row in rows}
    prompts = load_prompts(root / "data/prompts/eval.jsonl")
    expected = {prompt.id: size_of(prompt, load_params().evaluate) for prompt in prompts}
    assert sizes == {name: (size.width, size.height) for name, size in expected.items()}


def test_evaluation_at_other_sizes_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_keys(root, "evaluate", "sizes: [{width: 64, height: 64}, {width: 48, height: 32}]")
    text = "images of 64 x 64 are evaluated, and training uses images of 32 x 32, 48 x 32, 32 x 64"
    results = {result.name: result for result in check_prompts(load_params(), root)[0]}
    held_out = load_prompts(root / "data/prompts/eval.jsonl")
    names = {size.width for size in rows_by_size(held_out, load_params().evaluate)}
    assert 64 in names, "the ids of the world's eval prompts reach the first size"
    assert results["evaluate.sizes"].state == "warn" and text in results["evaluate.sizes"].text
    evaluate(Round.of(load_params(), root, "base"))
    assert caplog.text.count("are evaluated, and training uses") == 1


def test_sizes_are_divided_by_id() -> None:
    sizes = [ImageSize(width=48, height=32), ImageSize(width=32, height=64)]
    settings = sampling_params(sizes=sizes)
    prompts = [Prompt(f"p{number}", "a cat") for number in range(40)]
    rows = rows_by_size(prompts, settings)
    assert set(rows) == set(sizes) and all(len(part) > 10 for part in rows.values())
    assert rows_by_size(prompts[::-1], settings) != rows
    assert {p.id: size_of(p, settings) for p in prompts} == {p.id: size_of(p, settings) for p in prompts[::-1]}
    assert size_of(Prompt("p", "a", width=8, height=16), settings) == ImageSize(width=8, height=16)
    assert (of_size(settings, sizes[1]).height, of_size(settings, sizes[1]).sizes) == (64, None)


@pytest.mark.parametrize("line", ['"width": 64', '"width": 64, "height": 60', '"width": "64", "height": 64',
                                  '"width": 0, "height": 0', '"width": 64, "height": true'])  # fmt: skip
def test_unusable_sizes_are_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"id": "a", "prompt": "b", {line}}}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:1: width and height of 'a' must both be multiples of 8"):
        load_prompts(tmp_path / "p.jsonl")


def test_unusable_list_is_one_line(root: Path, capfd: pytest.CaptureFixture) -> None:
    set_keys(root, "generate", "sizes: [{width: 50, height: 32}]")
    assert cli.run(["generate", "001"]) == 2
    assert "generate.sizes.0.width" in capfd.readouterr().err
