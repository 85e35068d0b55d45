"""Models that take turns on a device: who is there when, and that no byte depends on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.config.schema import EarlyRejectionParams
from srpo.rewards.loading import load_pinned_rewards
from srpo.rewards.offloaded import OffloadedReward
from srpo.rounds import Round, RoundFiles
from srpo.runtime.turns import TURNS, Turns
from srpo.stages.base import pin_base
from srpo.stages.evaluate import evaluate
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from tests.training.helpers import with_runtime, with_train

UNET, VAE, CLIP = ("UNet2DConditionModel",), ("AutoencoderKL",), ("CLIPModel",)
TEXTS = ("CLIPTextModel", "CLIPTextModelWithProjection")
PROMPTS = ["a red circle", "a blue square"]


class Traveler(torch.nn.Module):
    """A module that notes where it goes."""

    def __init__(self, name: str, journal: list[str]) -> None:
        super().__init__()
        self.name = name
        self.journal = journal

    def to(self, device: torch.device | str) -> Traveler:  # type: ignore[override]
        self.journal.append(f"{self.name} to {device}")
        return self


def test_one_group_is_there_at_a_time() -> None:
    turns, journal, gpu = Turns(), [], torch.device("meta")
    one, two, three = (Traveler(name, journal) for name in ("one", "two", "three"))
    turns.bring([one, two], gpu)
    turns.bring([two, three], gpu)
    assert journal == ["one to meta", "two to meta", "one to cpu", "two to meta", "three to meta"]
    journal.clear()
    del two  # nobody needs it any more, and it is not kept
    turns.bring([], gpu)
    assert journal == ["three to cpu"]


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The groups of networks that were brought, by their classes."""
    found: list[tuple[str, ...]] = []
    bring = TURNS.bring

    def noted(modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        modules = list(modules)
        found.append(tuple(type(module).__name__ for module in modules))
        bring(modules, device)

    monkeypatch.setattr(TURNS, "bring", noted)
    return found


def written(params: Params, root: Path) -> dict[str, bytes]:
    """Run all stages that have models, and return what they wrote."""
    for stage in (generate, score, select, train):
        stage(Round.of(params, root, "001"))
    for key in ("base", "001"):
        evaluate(Round.of(params, root, key))
    files = RoundFiles(root, "001")
    folders = (files.candidates, files.scores, files.adapter, files.evaluation)
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True], ids=["unet", "text"])
def test_a_round_by_turns_has_the_same_bytes(world: Path, visits: list[tuple[str, ...]], text: bool) -> None:
    early = EarlyRejectionParams.model_validate(
        {"reward": "reward", "checkpoints": [{"step": 1, "keep": 2}], "audit_fraction": 0.5}
    )
    params = with_train(load_params(), train_text_encoder=text, steps=2)
    params = params.model_copy(update={"generate": params.generate.model_copy(update={"early_rejection": early})})
    pin_base(Round.of(params, world, "base"))
    expected = written(params, world)
    visits.clear()
    shutil.rmtree(world / ".srpo" / "cache")  # encode the prompts again
    assert written(with_runtime(params, offload=True, vae_batch_size=1), world) == expected
    assert set(visits) == {UNET, VAE, CLIP, TEXTS, (), *([(*UNET, *TEXTS)] if text else [])}
    first = visits.index(UNET)
    assert visits[first : first + 3] == [UNET, VAE, CLIP], "previews are decoded, then scored"


def test_rewards_wait_in_the_computers_memory(world: Path, visits: list[tuple[str, ...]]) -> None:
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    plain = load_pinned_rewards(params, world)
    assert visits == []
    rewards = load_pinned_rewards(with_runtime(params, offload=True), world)
    for name, reward in rewards.items():
        assert isinstance(reward, OffloadedReward)
        visits.clear()
        reward.prepare([PROMPTS])
        assert torch.equal(reward.score(images, PROMPTS), plain[name].score(images, PROMPTS))
        assert visits == [() if name == "accuracy" else CLIP] * 2
