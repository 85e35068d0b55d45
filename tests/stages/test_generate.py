"""What candidates are made with: cached prompt embeddings, a writer in the background, another VAE, the CUDA layout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.errors import UserError
from srpo.lineage.record import read_lineage
from srpo.models.pipeline import TEXT_PARTS, load_pipeline
from srpo.rounds import Round, RoundFiles
from srpo.runtime.background import Background
from srpo.runtime.device import speed_up
from srpo.sampling.batch_invariant import Tiles
from srpo.sampling.prompt_cache import prompt_embeds
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


def with_model(params: Params, **values) -> Params:
    return params.model_copy(update={"model": params.model.model_copy(update=values)})


def cached(root: Path) -> list[Path]:
    return sorted((root / ".srpo" / "cache" / "embeds").glob("*/*.safetensors"))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_second_round_and_evaluation_encode_nothing(
    params: Params, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(Round.of(params, world, "001"))
    first = content(RoundFiles(world, "001").candidates)
    evaluate(Round.of(params, world, "base"))
    measured = content(RoundFiles(world, "base").evaluation)
    monkeypatch.setattr(Sampler, "encode", lambda *_: pytest.fail("the text encoders were used"))
    generate(Round.of(params, world, "001"))
    assert content(RoundFiles(world, "001").candidates) == first
    evaluate(Round.of(params, world, "base"))
    assert content(RoundFiles(world, "base").evaluation) == measured


def test_embeddings_are_those_of_the_pipeline_and_of_no_batch(params: Params) -> None:
    sampler = Sampler(params)
    both, alone = sampler.encode(PROMPTS), sampler.encode(PROMPTS[1:])
    assert torch.equal(both.tokens[1:], alone.tokens) and torch.equal(both.pooled[1:], alone.pooled)
    whole = load_pipeline(params.model, torch.float32)
    tokens, no_tokens, pooled, no_pooled = whole.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    assert torch.allclose(both.tokens, torch.cat([tokens, no_tokens[:1]]), atol=1e-5)
    assert torch.allclose(both.pooled, torch.cat([pooled, no_pooled[:1]]), atol=1e-5)


def test_a_damaged_cache_is_mended_and_an_old_models_is_removed(
    params: Params, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
def test_only_a_pinned_hub_model_is_cached(params: Params, world: Path, revision: str | None, kept: int) -> None:
    base = {"source": "some/model", "revision": revision, "digest": None}
    write_json(RoundFiles(world, "base").adapter / "lineage.json", {"base": base})
    prompt_embeds(Sampler(params), PROMPTS, world)
    assert len(cached(world)) == kept


def test_at_most_two_pieces_wait_for_the_background() -> None:
    gate, done, started = threading.Event(), [], threading.Event()

    def feed() -> None:
        with Background() as writer:
            for number in range(4):
                writer.submit(lambda number=number: (gate.wait(), done.append(number)))
                fed.append(number)
                started.set()

    fed: list[int] = []
    feeder = threading.Thread(target=feed)
    feeder.start()
    started.wait()
    feeder.join(0.2)
    assert len(fed) <= 2 and feeder.is_alive()
    gate.set()
    feeder.join()
    assert done == [0, 1, 2, 3]


def test_an_error_in_the_background_ends_the_stage(
    params: Params, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="no space left"):
        generate(Round.of(params, world, "001"))
    assert not RoundFiles(world, "001").candidates.exists()


def test_the_cuda_layout_changes_rounding_only(params: Params) -> None:
    plain, fast = Sampler(params), Sampler(params)
    speed_up(fast.pipeline)
    attention = fast.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert attention.fused_projections and fast.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    embeds, noise = plain.encode(PROMPTS), plain.noise([1, 2], 32, 32)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    one, other = (sampler.denoise(noise, embeds[[0, 1]], embeds[[-1]], **options) for sampler in (plain, fast))
    assert torch.allclose(one, other, atol=1e-4)
    assert (plain.decode(one).int() - fast.decode(one).int()).abs().max() <= 1


def test_an_adapter_is_merged_before_projections_are_fused(params: Params, world: Path) -> None:
    from srpo.stages.score import score
    from srpo.stages.select import select
    from srpo.stages.train import train

    for stage in (generate, score, select, train):
        stage(Round.of(params, world, "001"))
    adapter = RoundFiles(world, "001").adapter
    plain, fast = Sampler(params, adapter), Sampler(params, adapter)
    speed_up(fast.pipeline)
    embeds, noise = plain.encode(PROMPTS), plain.noise([1, 2], 32, 32)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    merged, fused, base = (
        sampler.denoise(noise, embeds[[0, 1]], embeds[[-1]], **options) for sampler in (plain, fast, Sampler(params))
    )
    assert torch.allclose(merged, fused, atol=1e-4)
    assert not torch.allclose(merged, base, atol=1e-4), "the adapter changes nothing"


def test_another_vae_loads_from_its_folder_or_a_pipelines(params: Params, world: Path) -> None:
    own = load_pipeline(params.model, torch.float32, **dict.fromkeys(TEXT_PARTS)).vae
    with torch.no_grad():
        own.decoder.conv_out.bias += 0.5
    own.save_pretrained(world / "data" / "vae")
    own.save_pretrained(world / "data" / "other" / "vae")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    base = Sampler(params).decode(latents)
    one, other = (Sampler(with_model(params, vae=f"data/{name}")).decode(latents) for name in ("vae", "other"))
    assert torch.equal(one, other) and not torch.equal(one, base)
    pin_base(Round.of(with_model(params, vae="data/vae"), world, "base"))
    assert read_lineage(RoundFiles(world, "base"))["vae"]["source"] == "data/vae"
    with pytest.raises(UserError, match=r"model\.vae: can't load 'data/judge' as a VAE"):
        Sampler(with_model(params, vae="data/judge"))


@pytest.mark.parametrize(("upcast", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_vae_that_is_safe_in_half_precision_stays_there(
    params: Params, world: Path, upcast: bool, dtype: torch.dtype
) -> None:
    own = load_pipeline(params.model, torch.float32, **dict.fromkeys(TEXT_PARTS)).vae
    own.register_to_config(force_upcast=upcast)
    own.save_pretrained(world / "data" / "vae")
    half = with_model(params, vae="data/vae")
    half = half.model_copy(update={"runtime": half.runtime.model_copy(update={"dtype": "bfloat16"})})
    assert Sampler(half).vae.dtype == dtype


@pytest.mark.parametrize("count", [1, 8, 9, 16, 21])
def test_a_row_comes_out_the_same_whatever_stands_beside_it_and_however_many_threads_work(count: int) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 5))
    rows = torch.randn(21, 4, 8, 8)
    seen, threads = [], torch.get_num_threads()

    def function(tile: torch.Tensor) -> torch.Tensor:
        seen.append((len(tile), torch.is_inference_mode_enabled()))
        return network(tile)

    whole = Tiles().run(8, function, rows)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(Tiles().run(8, function, rows[:count]), whole[:count])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(8, True)}
    torch.testing.assert_close(whole.clone(), network(rows))
