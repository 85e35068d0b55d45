"""Training a LoRA or the whole UNet with each loss: where it starts, what stays frozen, what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE, read_lineage
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.train import train
from srpo.storage.hashing import digest, file_digest
from srpo.training.model import make_trainable
from tests.training.helpers import contents, losses, with_train

METHODS = ["lora", "full"]


def predict(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    conditions = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    x, text = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([10, 500]), text, added_cond_kwargs=conditions, return_dict=False)[0]


@pytest.mark.parametrize("objective", ["sft", "dpo", "nft"])
@pytest.mark.parametrize("method", METHODS)
def test_each_loss_trains_each_method_twice(params: Params, root: Path, method: str, objective: str) -> None:
    wanted = with_train(params, method=method, objective=objective, learning_rate=1e-2)
    base = predict(Sampler(params).unet)
    found = []
    for key in ("001", "002"):
        files = RoundFiles(root, key)
        train(Round.of(wanted, root, key))
        again = contents(files)
        train(Round.of(wanted, root, key))
        assert contents(files) == again, "the same training gave other bytes"
        assert len(losses(files)) == 3
        name = UNET_FILE if method == "full" else WEIGHTS_FILE
        lineage = read_lineage(RoundFiles(root, key))
        assert lineage["adapter"] == file_digest(files.adapter / name)
        assert lineage["params"]["train"]["objective"] == objective
        found.append(predict(Sampler(params, files.adapter).unet))
    assert lineage["parent_adapter"] == file_digest(RoundFiles(root, "001").adapter / name)
    assert not torch.allclose(found[0], base) and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("start", ["parent", "base"])
@pytest.mark.parametrize("method", METHODS)
def test_reference_is_the_model_training_started_from(params: Params, root: Path, method: str, start: str) -> None:
    wanted = with_train(params, method=method, start=start)
    train(Round.of(with_train(params, method=method), root, "001"))
    round = Round.of(wanted, root, "002")
    model = make_trainable(Sampler(params).unet, round, with_reference=True, dtype=torch.float32)
    expected = predict(Sampler(params, RoundFiles(root, "001").adapter if start == "parent" else None).unet)
    names = set(model.parameters)
    assert names and all(value.dtype == torch.float32 for value in model.parameters.values())
    assert torch.allclose(predict(model.denoiser.unet), expected, atol=1e-5)
    with torch.no_grad():
        for value in model.parameters.values():
            value.add_(0.1)
    trained = predict(model.denoiser.unet)
    with model.reference() as start:
        assert torch.allclose(predict(start.unet), expected, atol=1e-5)
    assert torch.equal(predict(model.denoiser.unet), trained) and not torch.allclose(trained, expected, atol=1e-3)
    assert set(model.parameters) == names, "using the reference changed what is trained"


def test_a_full_adapter_opens_in_plain_diffusers(params: Params, root: Path) -> None:
    from diffusers import UNet2DConditionModel

    files = RoundFiles(root, "001")
    train(Round.of(with_train(params, method="full"), root, "001"))
    assert {path.name for path in files.adapter.iterdir()} == {UNET_FILE, "config.json", "lineage.json"}
    plain = UNet2DConditionModel.from_pretrained(files.adapter)
    assert plain.dtype == torch.float32
    assert torch.equal(predict(plain), predict(Sampler(params, files.adapter).unet))


def test_lineage_names_the_winners_that_were_used(params: Params, root: Path) -> None:
    digests = {key: digest(RoundFiles(root, key).winners) for key in ("001", "002")}
    train(Round.of(params, root, "002"))
    lineage, alone = read_lineage(RoundFiles(root, "002")), losses(RoundFiles(root, "002"))
    assert (lineage["winners"], lineage["ancestors"]) == (digests["002"], {"001": digests["001"]})
    assert lineage["trained_on"] == ["002"]
    for values in ({"replay": 0.5}, {"start": "base"}):
        train(Round.of(with_train(params, **values), root, "002"))
        lineage = read_lineage(RoundFiles(root, "002"))
        assert (lineage["trained_on"], lineage["ancestors"]) == (["002", "001"], {"001": digests["001"]})
        assert losses(RoundFiles(root, "002")) != alone


def test_a_missing_or_other_parent_is_refused(params: Params, root: Path) -> None:
    with pytest.raises(UserError, match=rf"{UNET_FILE}: missing; run train of round 001"):
        train(Round.of(with_train(params, method="full"), root, "002"))
    with pytest.raises(UserError, match=r"rounds\.002\.train: .*train_text_encoder differ from those of parent 001"):
        train(Round.of(with_train(params, rank=3), root, "002"))
    with pytest.raises(UserError, match=r"rounds\.002\.train: .*train_text_encoder differ from those of parent 001"):
        train(Round.of(with_train(params, target_modules=["to_q"]), root, "002"))
    train(Round.of(with_train(params, rank=3, start="base"), root, "002"))  # who starts from base may choose
