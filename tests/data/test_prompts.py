"""Prompt files: what ships is disjoint, what is wrong is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srpo.data.prompts import Prompt, check_disjoint, load_prompts
from srpo.errors import UserError

REPO = Path(__file__).parents[2]


def test_shipped_prompts_are_disjoint() -> None:
    train, evaluation = (load_prompts(REPO / "data" / "prompts" / f"{name}.jsonl") for name in ("train", "eval"))
    check_disjoint(train, evaluation)
    assert len(train) >= 100 and len(evaluation) >= 50


BAD = {
    "not json": ("{", "not JSON"),
    "not an object": ("[1]", "must be a JSON object"),
    "no id": ('{"prompt": "x"}', "id is missing"),
    "number id": ('{"id": 3, "prompt": "x"}', "id is missing or not text"),
    "path id": ('{"id": "../x", "prompt": "x"}', "must be letters"),
    "no prompt": ('{"id": "a"}', "prompt is missing"),
    "empty prompt": ('{"id": "a", "prompt": "  "}', "is empty"),
    "nul": ('{"id": "a", "prompt": "x\\u0000y"}', "NUL"),
    "unknown key": ('{"id": "a", "prompt": "x", "promt": "y"}', "unknown key 'promt'"),
    "bad tags": ('{"id": "a", "prompt": "x", "tags": ["y"]}', "must map names to texts"),
    "duplicate id": ('{"id": "ok", "prompt": "x"}', "'ok' is also on line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    line, expected = BAD[name]
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "ok", "prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ") and expected in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such prompt file"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="has no prompts"):
        load_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "a", "prompt": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")


def test_any_text_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    texts = ["مرحبا بالعالم", "a \u2028 line separator", "🎈🎈", 'quotes " and \\']
    path = tmp_path / "p.jsonl"
    rows = [json.dumps({"id": f"p{i}", "prompt": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert [prompt.prompt for prompt in load_prompts(path)] == texts


def test_overlap_ignores_case_and_spacing() -> None:
    with pytest.raises(UserError, match="'e1' has the text of train prompt 't1'"):
        check_disjoint([Prompt("t1", "A red  circle")], [Prompt("e1", "a Red circle ")])
