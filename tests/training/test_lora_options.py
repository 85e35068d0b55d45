"""Kinds of LoRA: DoRA, rsLoRA, alpha, dropout, convolutions, and training that starts from a LoRA of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import torch
from _pytest.mark import ParameterSet
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from srpo.config.loader import Params
from srpo.config.schema import InitialLora
from srpo.errors import UserError
from srpo.lineage.record import WEIGHTS_FILE
from srpo.models.lora_files import read_lora
from srpo.release.export import write_kohya
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.train import train
from srpo.storage.hashing import file_digest
from srpo.training.model import make_trainable
from tests.training.helpers import contents, with_runtime, with_train
from tests.training.test_resume import interrupted
from tests.training.test_train import predict

CONVOLUTIONS = ["to_q", "conv1", "conv2", "proj_in"]
KINDS = {
    "dora": {"use_dora": True, "target_modules": CONVOLUTIONS, "alpha": 3.0},
    "rslora": {"use_rslora": True, "alpha": 4.0},
    "dropout": {"lora_dropout": 0.5, "target_modules": CONVOLUTIONS, "objective": "dpo"},
}


def slow(kind: str) -> ParameterSet:
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["dora", slow("rslora"), slow("dropout")])
def test_each_kind_is_trained_sampled_and_exported(params: Params, root: Path, kind: str) -> None:
    wanted = with_train(params, learning_rate=1e-2, **KINDS[kind])
    base = predict(Sampler(params).unet)
    for key in ("001", "002"):  # the second continues the first
        train(Round.of(wanted, root, key))
    adapter = RoundFiles(root, "002").adapter
    sampled = predict(Sampler(params, adapter).unet)
    assert not torch.allclose(sampled, base, atol=1e-3)
    round = Round.of(with_train(wanted, start="parent"), root, "002")
    round.parent_files.adapter.joinpath(WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes())
    (round.parent_files.adapter / "lineage.json").unlink()
    trained = make_trainable(Sampler(params).unet, round, with_reference=False, dtype=torch.float32)
    assert torch.allclose(predict(trained.denoiser.unet), sampled, atol=1e-4), "training goes on from what is sampled"

    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "data" / "base")
    pipeline.load_lora_weights(adapter, weight_name=WEIGHTS_FILE)
    assert torch.allclose(predict(pipeline.unet), sampled, atol=1e-4), "plain diffusers reads it the same"
    write_kohya(adapter, root / "kohya.safetensors")
    unet = Sampler(params).unet
    for module, layer in read_lora("kohya", root / "kohya.safetensors", {"unet": unet})["unet"].items():
        weight = unet.get_submodule(module).weight
        weight.data = layer.apply(weight.data, 1.0)
    assert torch.allclose(predict(unet), sampled, atol=1e-4)


@pytest.mark.parametrize("kind", [slow("dora"), "dropout"])
def test_each_kind_resumes_to_the_same_bytes(params: Params, root: Path, kind: str) -> None:
    files = RoundFiles(root, "001")
    wanted = with_runtime(with_train(params, steps=5, **KINDS[kind]), checkpoint_every=2)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    interrupted(wanted, root, 4)
    train(Round.of(wanted, root, "001"))
    assert contents(files) == undisturbed


def norms(files: RoundFiles) -> list[float]:
    return pl.read_csv(files.training)["grad_norm"].to_list()


def test_dropout_does_not_depend_on_passes(params: Params, root: Path) -> None:
    files = RoundFiles(root, "001")
    wanted = with_train(params, lora_dropout=0.5, steps=4, learning_rate=1e-2)
    train(Round.of(wanted, root, "001"))
    whole = norms(files)
    train(Round.of(with_runtime(wanted, train_batch_size=1, gradient_checkpointing=True), root, "001"))
    assert norms(files) == pytest.approx(whole, rel=1e-3)
    train(Round.of(with_train(wanted, lora_dropout=0.0), root, "001"))
    assert norms(files) != pytest.approx(whole, rel=0.1)


def test_modules_that_are_not_there_are_refused(params: Params, root: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.target_modules: .*to_nothing"):
        train(Round.of(with_train(params, target_modules=["to_nothing"]), root, "001"))


@pytest.mark.parametrize("kind", [slow("rslora"), "dora"])
def test_a_round_starts_from_a_lora_of_ones_own(params: Params, root: Path, kind: str) -> None:
    wanted = with_train(params, learning_rate=1e-2, **KINDS[kind])
    train(Round.of(wanted, root, "001"))
    file = root / "data" / "style.safetensors"
    write_kohya(RoundFiles(root, "001").adapter, file)
    state = load_file(file)
    state = {name: value / 2 if name.endswith(".alpha") else value for name, value in state.items()}
    save_file({name: value * 2 if "lora_up" in name else value for name, value in state.items()}, file)
    sampled = predict(Sampler(params, RoundFiles(root, "001").adapter).unet)
    lora = InitialLora(path="data/style.safetensors", sha256=file_digest(file))

    def started(**values: object) -> torch.nn.Module:
        round = Round.of(with_train(wanted, **{"initial_lora": lora} | values), root, "001")
        return make_trainable(Sampler(params).unet, round, with_reference=True, dtype=torch.float32)

    model = started()
    assert torch.allclose(predict(model.denoiser.unet), sampled, atol=1e-4)
    with model.reference() as start:
        assert torch.allclose(predict(start.unet), sampled, atol=1e-4)
    with pytest.raises(UserError, match=r"or train_text_encoder differ from those of train\.initial_lora"):
        started(rank=3)
    with pytest.raises(UserError, match=rf"^train\.initial_lora\.sha256: .* is {lora.sha256}; set it"):
        started(initial_lora=InitialLora(path=lora.path, sha256=re.sub(".", "0", lora.sha256)))
