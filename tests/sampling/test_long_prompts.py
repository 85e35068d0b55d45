"""Prompts of several chunks: encoding, sampling and training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.models.pipeline import load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling.conditioning import stacked
from srpo.sampling.prompt_cache import prompt_embeds
from srpo.sampling.sampler import Sampler, sample_images, seeded
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from tests.support.world import LENGTH, sampling_params, write_prompts

SHORT, LONG, LONGER = "a red cat", "a b c d e f g h i j k l m n o p q r", "x y z " * 12
TEXTS = [SHORT, LONG, LONGER, "a blue cat"]
READ = LENGTH - 2  # tokens of a chunk; each letter is one


@pytest.fixture(autouse=True)
def without_templates(world: Path) -> None:
    """Without the judge that knows the world's own prompts only."""
    lines = (world / "params.yaml").read_text().splitlines(keepends=True)
    (world / "params.yaml").write_text("".join(line for line in lines if "kind: templates" not in line))


@pytest.fixture
def params(world: Path) -> Params:
    text = (world / "params.yaml").read_text()
    (world / "params.yaml").write_text(text.replace("model:\n", "model:\n  long_prompts: chunk\n", 1))
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def test_each_chunk_is_encoded_as_a_prompt(params: Params) -> None:
    embeds = Sampler(params).encode(TEXTS)
    assert [embeds.num_chunks(row) for row in range(5)] == [1, 2, 3, 1, 1]
    assert embeds.groups([0, 1, 2, 3, 1]) == [[0, 3], [1, 4], [2]], "a batch has prompts of one length"
    pipeline = load_pipeline(params.model, torch.float32)
    letters = LONG.split()
    parts = [" ".join(letters[:READ]), " ".join(letters[READ:])]
    tokens, _, pooled, _ = pipeline.encode_prompt(parts, device="cpu", do_classifier_free_guidance=False)
    assert torch.allclose(embeds.text(1), torch.cat([*tokens]), atol=1e-5)
    assert torch.allclose(embeds.pooled[1], pooled[0], atol=1e-5), "the pooled output is the first chunk's"


def test_images_equal_the_pipelines(params: Params, world: Path) -> None:
    """The negative prompt has another number of chunks, up to whose least common multiple both are repeated."""
    sampler = Sampler(params)
    pipeline = load_pipeline(params.model, torch.float32)
    embeds = prompt_embeds(sampler, [LONG], world, [LONGER])
    latents, _ = sample_images(sampler, embeds, [0], [3], sampling_params(3, 4.0))
    both = stacked([embeds.text(0), embeds.text(embeds.negatives[0])], embeds.pooled[[0, embeds.negatives[0]]])
    assert both.tokens.shape[1] == 6 * LENGTH
    theirs = pipeline(
        prompt_embeds=both.tokens[:1],
        negative_prompt_embeds=both.tokens[1:],
        pooled_prompt_embeds=both.pooled[:1],
        negative_pooled_prompt_embeds=both.pooled[1:],
        generator=seeded([3])[0],
        num_inference_steps=3,
        guidance_scale=4.0,
        height=32,
        width=32,
        output_type="latent",
    ).images
    assert ((latents.float() - theirs).abs().max() / theirs.std()).item() < 2e-3
    cut, _ = sample_images(sampler, sampler.encode([" ".join(LONG.split()[:READ])]), [0], [3], sampling_params(3, 4.0))
    assert not torch.allclose(latents, cut, atol=1e-2), "what is beyond the first chunk changes the image"


def test_repeating_the_tokens_changes_nothing(params: Params) -> None:
    sampler = Sampler(params)
    embeds, noise = sampler.encode(TEXTS), sampler.noise(seeded([1]), 32, 32)
    once = embeds[[1]]
    twice = once._replace(tokens=once.tokens.repeat(1, 3, 1))
    one, other = (sampler.denoise(noise, given, embeds[[-1]], sampling_params()) for given in (once, twice))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("rejecting", [False, True])
def test_generate_is_the_same_in_any_batch(params: Params, world: Path, rejecting: bool) -> None:
    write_prompts(world / "data/prompts/train.jsonl", TEXTS, "t")
    if rejecting:
        rules = "{reward: reward, checkpoints: [{step: 1, keep: 2}]}"
        text = (world / "params.yaml").read_text()
        (world / "params.yaml").write_text(text.replace("generate:\n", f"generate:\n  early_rejection: {rules}\n", 1))
        pin_base(Round.of(load_params(), world, "base"))
    found = []
    for size in (16, 2):
        params = load_params()
        params = params.model_copy(update={"runtime": params.runtime.model_copy(update={"batch_size": size})})
        generate(Round.of(params, world, "001"))
        found.append(list(parquet.read_rows(RoundFiles(world, "001").candidates)))
    assert found[0] == found[1]
    assert [row["prompt"] for row in found[0]] == [text for text in TEXTS for _ in range(3)]


@pytest.mark.slow
def test_all_stages_read_long_prompts(params: Params, world: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_prompts(world / "data/prompts/train.jsonl", TEXTS, "t")
    write_prompts(world / "data/prompts/eval.jsonl", [text + " green" for text in TEXTS], "e")
    evaluate(Round.of(params, world, "base"))
    for stage in (generate, score, select, train, evaluate):
        stage(Round.of(params, world, "001"))
    assert "cut off" not in caplog.text


def test_training_says_how_many_prompts_are_cut(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "srpo")
    write_prompts(world / "data/prompts/train.jsonl", TEXTS, "t")
    pin_base(Round.of(load_params(), world, "base"))
    round = Round.of(load_params(), world, "001")
    for stage in (generate, score, select, train):
        stage(round)
    lines = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert [line.split(" are longer")[0] for line in lines] == [
        "generate 001: 2 of 4 prompts",
        "train 001: 2 of 4 prompts",
    ]
