"""Draws from a pool of prompts: none twice on a path before all were drawn, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.data.prompt_draw import Draw, draw_prompts
from srpo.data.prompts import Prompt
from srpo.errors import UserError
from srpo.preflight import cost
from srpo.preflight.cost import Images
from srpo.preflight.data import check_prompts
from srpo.rounds import Round
from srpo.stages.base import pin_base
from srpo.stages.generate import generate

POOL = [Prompt(f"p{i:02d}", f"prompt {i}", {"style": ("photo", "anime", "sketch")[i % 3]}) for i in range(30)]
EIGHT = Draw(8, {})


def ids(path: list[Draw], seed: int = 0, pool: list[Prompt] = POOL) -> list[str]:
    return [prompt.id for prompt in draw_prompts(pool, path, seed)]


def test_no_prompt_comes_twice_before_all_came() -> None:
    rounds = [ids([EIGHT] * (depth + 1)) for depth in range(8)]
    assert [len(drawn) for drawn in rounds] == [8] * 8
    three = [name for drawn in rounds[:3] for name in drawn]
    assert len(set(three)) == 24
    assert {prompt.id for prompt in POOL} - set(three) < set(rounds[3])  # the last six, and two for the second time
    times = Counter(name for drawn in rounds for name in drawn)
    assert sorted(times.values()) == [2] * 26 + [3] * 4
    assert rounds[0] != rounds[4]  # the second time in another order


def test_draws_depend_on_the_seed_and_not_on_the_order_of_the_pool() -> None:
    assert ids([EIGHT]) != ids([EIGHT], seed=1)
    assert sorted(ids([EIGHT] * 2, pool=POOL[::-1])) == ids([EIGHT] * 2)
    assert ids([EIGHT]) == sorted(ids([EIGHT]))  # in the pool's order


def test_rounds_on_a_path_may_draw_differently() -> None:
    photos = [prompt.id for prompt in POOL if prompt.tags["style"] == "photo"]
    drawn = ids([EIGHT, Draw(5, {"style": ["photo"]})])
    assert set(drawn) < set(photos) and len(drawn) == 5 and not set(drawn) & set(ids([EIGHT]))
    assert ids([EIGHT, Draw(50, {"style": ["photo"]})]) == photos  # more than fit: all that fit
    assert ids([Draw(None, {})]) == [prompt.id for prompt in POOL]
    assert len(ids([Draw(None, {"style": ["photo", "anime"]})])) == 20
    assert ids([Draw(None, {"color": ["red"]})]) == []


def set_generate(**rounds: dict) -> None:
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load(Path("params.yaml").read_text())
    for key, override in rounds.items():
        raw["rounds"][key.removeprefix("r")]["generate"] = override
    Path("params.yaml").write_text(json.dumps(raw))


def test_a_round_makes_candidates_for_its_draw(world: Path) -> None:
    set_generate(r001={"prompts_per_round": 1}, r002={"prompts_per_round": 2})
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    first = Round.of(params, world, "001")
    generate(first)
    drawn = {row["prompt_id"] for row in parquet.read_rows(first.files.candidates, ["prompt_id"])}
    second = Round.of(params, world, "002")
    assert [own.prompts_per_round for own in second.generate_of_path] == [1, 2]
    assert len(drawn) == 1 and parquet.table(first.files.candidates, ["prompt_id"]).height == 3
    one = params.for_round("001")
    assert cost.round_bytes(one, Images(4), Images(1)) == cost.round_bytes(one, Images(1), Images(1))


def test_tags_that_no_prompt_has_are_one_line(world: Path) -> None:
    set_generate(
        r001={"tags": {"style": ["photo"]}}, r002={"prompts_per_round": 9}, r003={"candidates": "data/candidates-0"}
    )
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    with pytest.raises(UserError, match=r"^rounds\.001\.generate\.tags: no prompt of data/prompts/train\.jsonl"):
        generate(Round.of(params, world, "001"))
    found = {result.name: result for result in check_prompts(params, world)[0]}
    assert found["rounds.001.generate.tags"].state == "fail"
    assert found["rounds.003.generate.candidates"].state == "fail"
    assert "only 4 prompts fit" in found["rounds.002.generate.prompts_per_round"].text
