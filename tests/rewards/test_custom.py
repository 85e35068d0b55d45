"""Rewards of the user's own, and rewards that misbehave: one line that names them."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from srpo.config import reward_families as families
from srpo.config.loader import load_params
from srpo.data.decoding import decode_images
from srpo.errors import UserError
from srpo.rewards.loading import load_rewards
from srpo.rewards.validated import ValidatedReward
from srpo.rounds import Round
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score

BRIGHTNESS = '''
class Brightness:
    """Mean of all pixels, 0 to 1."""

    def __init__(self, model, revision, device, dtype):
        self.model = model

    def score(self, images, prompts):
        return images.float().div(255).mean(dim=(1, 2, 3))
'''
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


def with_judge(world: Path, judge: str) -> None:
    text = (world / "params.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("  accuracy:"))
    (world / "params.yaml").write_text(text.replace(line, f"  accuracy: {{{judge}, role: judge}}"))


def test_custom_class_scores_a_round(world: Path) -> None:
    import polars as pl

    from srpo.data import parquet
    from srpo.rounds import RoundFiles

    (world / "my_rewards.py").write_text(BRIGHTNESS)
    with_judge(world, "kind: 'my_rewards:Brightness', revision: v1")
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    generate(Round.of(params, world, "001"))
    score(Round.of(params, world, "001"))
    table = pl.read_parquet(RoundFiles(world, "001").scores / "judge/accuracy.parquet")
    cells = [row["image"] for row in parquet.read_rows(RoundFiles(world, "001").candidates, ["image"])]
    assert table["accuracy"].to_list() == pytest.approx([float(decode_images([cell]).mean() / 255) for cell in cells])
    assert '"revision": "v1"' in (world / "rounds" / "base" / "rewards.json").read_text()


def test_entry_point_kind(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "my_rewards.py").write_text(BRIGHTNESS)
    point = EntryPoint("brightness", "my_rewards:Brightness", families.ENTRY_POINTS)
    monkeypatch.setattr(families, "entry_points", lambda group: [point] if group == "srpo.rewards" else [])
    with_judge(world, "kind: brightness")
    found = load_all(world)["accuracy"].score(IMAGES, ["", ""])
    assert torch.allclose(found, IMAGES.float().div(255).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no_such_module:Brightness", "rewards.accuracy: kind 'no_such_module:Brightness' can't be imported"),
        ("srpo.rewards.clip:Klip", "has no attribute 'Klip'"),
    ],
)
def test_missing_class(world: Path, kind: str, expected: str) -> None:
    with_judge(world, f"kind: '{kind}'")
    with pytest.raises(UserError, match=r"rewards\.accuracy") as caught:
        load_all(world)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_kind(world: Path) -> None:
    with_judge(world, "kind: brightness")
    with pytest.raises(UserError, match=r"rewards\.accuracy\.kind: unknown reward 'brightness'; choose one of clip,"):
        load_params()


def load_all(world: Path) -> dict[str, ValidatedReward]:
    params = load_params()
    return load_rewards(params.rewards, params.runtime, world)


class Answers:
    """A reward that gives the same answer to everything, or raises it."""

    def __init__(self, answer) -> None:
        self.answer = answer

    def score(self, images, prompts):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (torch.zeros(3), r"rewards\.bad: score returned torch\.float32 \[3\] for 2 images"),
        (torch.zeros(2, 1), r"torch\.float32 \[2, 1\] for 2 images"),
        ([0.0, 1.0], r"score returned list"),
        (None, r"score returned NoneType"),
        (ZeroDivisionError("a\nb"), r"rewards\.bad: score raised ZeroDivisionError: a b \(test_custom\.py:\d+\)"),
        (UserError("no template"), r"^rewards\.bad: no template$"),
    ],
)
def test_wrong_return_values(answer, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        ValidatedReward("bad", Answers(answer)).score(IMAGES, ["", ""])
    assert "\n" not in str(caught.value)


def test_out_of_memory_is_not_a_user_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        ValidatedReward("bad", Answers(torch.OutOfMemoryError())).score(IMAGES, ["", ""])


def test_nan_passes_as_float32() -> None:
    found = ValidatedReward("odd", Answers(torch.tensor([float("nan"), float("inf")], dtype=torch.float64)))
    assert found.score(IMAGES, ["", ""]).dtype == torch.float32
    with pytest.raises(UserError, match=r"evaluate\.features: rewards\.odd has no image features"):
        found.features(IMAGES)
