"""The cache of prompt embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.models.pipeline import load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.sampling import prompt_cache
from srpo.sampling.prompt_cache import StoredEmbeds, prompt_embeds
from srpo.sampling.sampler import Sampler
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.generate import generate
from srpo.storage.json_files import write_json

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def cached(root: Path) -> list[Path]:
    return sorted((root / ".srpo" / "cache" / "embeds").glob("*/*.safetensors"))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_cached_embeddings_are_reused(params: Params, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(Round.of(params, world, "001"))
    first = content(RoundFiles(world, "001").candidates)
    evaluate(Round.of(params, world, "base"))
    measured = content(RoundFiles(world, "base").evaluation)
    monkeypatch.setattr(Sampler, "encode", lambda *_: pytest.fail("the text encoders were used"))
    generate(Round.of(params, world, "001"))
    assert content(RoundFiles(world, "001").candidates) == first
    evaluate(Round.of(params, world, "base"))
    assert content(RoundFiles(world, "base").evaluation) == measured


def test_embeddings_equal_the_pipelines(params: Params) -> None:
    sampler = Sampler(params)
    both, alone = sampler.encode(PROMPTS), sampler.encode(PROMPTS[1:])
    assert torch.equal(both.tokens[1:], alone.tokens) and torch.equal(both.pooled[1:], alone.pooled)
    whole = load_pipeline(params.model, torch.float32)
    tokens, no_tokens, pooled, no_pooled = whole.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    assert torch.allclose(both.tokens, torch.cat([tokens, no_tokens[:1]]), atol=1e-5)
    assert torch.allclose(both.pooled, torch.cat([pooled, no_pooled[:1]]), atol=1e-5)


def test_damaged_and_stale_files_are_replaced(params: Params, world: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampler = Sampler(params)
    fresh = prompt_embeds(sampler, PROMPTS, world)
    (file,) = cached(world)
    whole = file.read_bytes()
    for damage in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"nonsense" * 9):
        file.write_bytes(damage)
        again = prompt_embeds(sampler, PROMPTS, world)
        assert torch.equal(again.tokens, fresh.tokens) and torch.equal(again.pooled, fresh.pooled)
        assert file.read_bytes() == whole
    assert caplog.text.count("damaged; encoding its prompts anew") == 4
    prompt_embeds(sampler, PROMPTS[::-1], world)
    assert len(cached(world)) == 2
    (world / "data" / "base" / "README.md").write_text("another base")
    pin_base(Round.of(params, world, "base"))
    prompt_embeds(sampler, PROMPTS, world)
    assert len(cached(world)) == 1 and cached(world) != [file]


@pytest.mark.parametrize(("revision", "kept"), [("main", 0), (None, 0), ("a" * 40, 1)])
def test_only_pinned_hub_models_are_cached(params: Params, world: Path, revision: str | None, kept: int) -> None:
    base = {"source": "some/model", "revision": revision, "digest": None}
    write_json(RoundFiles(world, "base").adapter / "lineage.json", {"base": base})
    prompt_embeds(Sampler(params), PROMPTS, world)
    assert len(cached(world)) == kept


@pytest.mark.parametrize("count", [1, 4, 5])
def test_stored_rows_are_those_of_prompt_embeds(world: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    sampler = Sampler(params)
    prompts = ["a red circle", "a blue cross", "a green square", "a red cross", "a blue circle"][:count]
    expected = prompt_embeds(sampler, prompts, world)
    monkeypatch.setattr(prompt_cache, "PROMPTS_PER_FILE", 2)
    rows = [count, *range(count), 0, count]
    for _ in range(2):
        stored = StoredEmbeds(sampler, prompts, world)
        found = stored[rows]
        assert len(stored) == count + 1
        assert torch.equal(found.tokens, expected.tokens[rows]) and torch.equal(found.pooled, expected.pooled[rows])
        monkeypatch.setattr(sampler, "encode", None)  # a second time all comes from the files
