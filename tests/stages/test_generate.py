"""Stage generate: batches, interruptions and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.rounds import Round, RoundFiles
from srpo.sampling import batch_invariant
from srpo.sampling.sampler import Sampler
from srpo.stages import generate as module
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select


@pytest.fixture
def params(world: Path) -> Params:
    pin_base(Round.of(load_params(), world, "base"))
    return load_params()


def with_batch_size(params: Params, size: int) -> Params:
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"batch_size": size})})


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_candidates_do_not_depend_on_batch_size(params: Params, world: Path) -> None:
    files, found = RoundFiles(world, "001"), []
    for size in (1, 5, 16):
        generate(Round.of(with_batch_size(params, size), world, "001"))
        found.append(content(files.candidates))
    assert found[0] == found[1] == found[2]
    rows = list(parquet.read_rows(files.candidates))
    assert len(rows) == 4 * 3
    assert len({row["seed"] for row in rows}) == len({tuple(row["latents"]) for row in rows}) == len(rows)


def test_large_networks_give_the_same_without_padding(
    params: Params, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows run one by one, and text encoders have left memory when the first image is made."""
    monkeypatch.setattr(batch_invariant, "LARGE_WEIGHTS", 1000)
    real = Sampler.denoise

    def denoise(self: Sampler, *arguments, **options) -> torch.Tensor:
        assert self._unet_rows == self._decoder_rows == 1
        assert "text_pipeline" not in vars(self)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Sampler, "denoise", denoise)
    files, found = RoundFiles(world, "001"), []
    for size in (1, 5):
        shutil.rmtree(world / ".srpo" / "cache", ignore_errors=True)
        generate(Round.of(with_batch_size(params, size), world, "001"))
        found.append(content(files.candidates))
    assert found[0] == found[1]


def test_a_worker_does_not_hash_the_base_again(params: Params, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(module, "check_base", checked.append)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    generate(Round.of(params, world, "001"))
    assert not checked
    monkeypatch.delenv("RANK")
    generate(Round.of(params, world, "001"))
    assert not checked, "nothing was left to make"
    generate(Round.of(params, world, "001"))
    assert checked == [world]


def test_out_of_memory_halves_the_batch(
    params: Params, world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from srpo.sampling.sampler import Sampler

    files, sizes, real = RoundFiles(world, "001"), [], Sampler.denoise
    generate(Round.of(with_batch_size(params, 6), world, "001"))
    undisturbed = content(files.candidates)

    def small(self: Sampler, noise: torch.Tensor, *arguments, **options) -> torch.Tensor:
        sizes.append(len(noise))
        if len(noise) > 2:
            raise torch.OutOfMemoryError
        return real(self, noise, *arguments, **options)

    monkeypatch.setattr(Sampler, "denoise", small)
    generate(Round.of(with_batch_size(params, 6), world, "001"))
    assert content(files.candidates) == undisturbed
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] and "going on with 1" in caplog.text
    monkeypatch.setattr(Sampler, "denoise", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        generate(Round.of(with_batch_size(params, 6), world, "001"))


def test_killed_generate_resumes_with_its_shards(params: Params, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RoundFiles(world, "001")
    generate(Round.of(params, world, "001"))
    undisturbed = content(files.candidates)
    written, real = [], parquet.write_table

    def dies_at_second(path: Path, *args) -> None:
        if written and not path.with_name("allowed").exists():
            raise KeyboardInterrupt
        real(path, *args)
        written.append(path)

    monkeypatch.setattr(parquet, "write_table", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        generate(Round.of(params, world, "001"))
    first = written[0]
    stamp = first.stat().st_mtime_ns
    monkeypatch.setattr(parquet, "write_table", real)
    generate(Round.of(params, world, "001"))
    assert content(files.candidates) == undisturbed
    assert (files.candidates / first.name).stat().st_mtime_ns == stamp, "the finished shard was made again"


def test_hf_datasets_loads_candidates_with_images(params: Params, world: Path) -> None:
    import datasets as hf

    files = RoundFiles(world, "001")
    for stage in (generate, score, select):
        stage(Round.of(params, world, "001"))
    for folder, rows in ((files.candidates, 12), (files.winners, 4)):
        pattern = str(folder / "*.parquet")
        loaded = hf.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(world / "hf"))
        assert loaded.num_rows == rows
        assert loaded[0]["image"].size == (32, 32)


def test_write_errors_end_the_stage(params: Params, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="no space left"):
        generate(Round.of(params, world, "001"))
    assert not RoundFiles(world, "001").candidates.exists()
