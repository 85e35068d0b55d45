"""Prompts that are longer than the text encoders read."""

from __future__ import annotations

from pathlib import Path

import pytest

from srpo.config.loader import load_params
from srpo.config.schema import ModelParams
from srpo.data.prompts import Prompt, check_disjoint
from srpo.errors import UserError
from srpo.models.tokenizer import clip_tokenizer, load_tokenizer, text_read
from srpo.rounds import Round
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from tests.support.world import write_prompts

CUT = ModelParams(base="any")


def test_only_cut_texts_are_shortened() -> None:
    read = text_read(CUT, clip_tokenizer("!"))
    assert read("cat " * 75) is None  # with start and end 77 tokens
    assert read("cat " * 76) == read("cat " * 75 + "dog") != read("dog " * 76)


def test_prompts_equal_after_the_cut_are_not_held_out() -> None:
    read = text_read(CUT, clip_tokenizer("!"))
    start = "a red circle " * 30
    train = [Prompt("train-0", start + "with a tree")]
    with pytest.raises(UserError, match=r"'eval-0' has the text of train prompt 'train-0', equal in all tokens"):
        check_disjoint(train, [Prompt("eval-0", start + "with a house")], read)
    check_disjoint(train, [Prompt("eval-0", "with a house " + start)], read)
    chunked = CUT.model_copy(update={"long_prompts": "chunk"})
    check_disjoint(train, [Prompt("eval-0", start + "with a house")], text_read(chunked, clip_tokenizer("!")))
    check_disjoint(train, [Prompt("eval-0", start + "with a house")])


def test_generate_says_once_what_is_cut(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    limit = load_tokenizer(params.model, world).model_max_length
    write_prompts(
        world / "data/prompts/train.jsonl", ["a " * (limit - 2), *(f"{n} " + "a " * limit for n in "123")], "t"
    )
    generate(Round.of(params, world, "001"))
    (line,) = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert line.startswith(f"generate 001: 3 of 4 prompts are longer than the {limit} tokens") and "t-0001" in line
