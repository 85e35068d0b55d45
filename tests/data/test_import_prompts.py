"""Import of prompts: sources, cleaning, repeats, the held-out split, and the command.

python -m pytest tests/data/test_import_prompts.py
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.cli import run
from srpo.data.import_prompts import import_prompts
from srpo.data.near_repeats import THRESHOLD, find_near_repeats, fold, similarity
from srpo.data.prompt_cleaning import clean_prompt
from srpo.data.prompts import check_disjoint, load_prompts

WORDS = [
    a + b for a in ("ba", "ce", "di", "fa", "gu", "ha", "ji", "ke") for b in ("rt", "lm", "nks", "pper", "st", "vo")
]


def texts(count: int, seed: int = 0, words: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def imported(folder: Path, sources: list[Path | str], **settings):
    files = folder / "train.jsonl", folder / "eval.jsonl"
    summary = import_prompts([str(source) for source in sources], *files, **{"eval_count": 5} | settings)
    return summary, *map(load_prompts, files)


@pytest.mark.parametrize(
    ("text", "cleaned", "removed"),
    [
        ("a cat --n 4", "a cat", {"--n": 1}),
        ("a fox, snow --ar 3:2 --v 5 --style raw", "a fox, snow", {"--ar": 1, "--v": 1, "--style": 1}),
        ("tank --no wheels, doors --s 250", "tank", {"--no": 1, "--s": 1}),
        ("a cat --tile with a hat", "a cat with a hat", {"--tile": 1}),
        ("a photo \u2014ar 16:9", "a photo", {"--ar": 1}),
        ("(red hat:1.2), <lora:foo:0.8> girl", "red hat, girl", {"(word:1.2)": 1, "<lora:foo>": 1}),
        ("(a (b:1.1) c:1.3)", "a b c", {"(word:1.2)": 2}),
        ("((blue)) sky [[cloud]]", "blue sky cloud", {"((word))": 2}),
        ("smile \\(emoji\\) (fruit), 12:30 (1:2)", "smile (emoji) (fruit), 12:30 (1:2)", {}),
        ("fox\nNegative prompt: bad\nSteps: 20, Sampler: x", "fox", {"settings of A1111": 1}),
        ("a\x07b\u202ec\nd", "abc d", {"U+0007": 1, "U+202E RIGHT-TO-LEFT OVERRIDE": 1}),
        (
            "\U0001f468\u200d\U0001f469 a well-known house -- nice",
            "\U0001f468\u200d\U0001f469 a well-known house -- nice",
            {},
        ),
    ],
)
def test_options_are_taken_out(text: str, cleaned: str, removed: dict[str, int]) -> None:
    found = clean_prompt(text)
    assert (found.text, dict(found.removed)) == (cleaned, removed)


def test_syntax_without_a_plain_text_is_named() -> None:
    found = clean_prompt("[red:blue:0.5] car {a|b}")
    assert found.text == "[red:blue:0.5] car {a|b}"
    assert dict(found.left) == {"prompt editing [from:to:when]": 1, "alternatives [a|b] or {a|b}": 1}


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_a_cleaned_prompt_is_one_printable_line(text: str) -> None:
    cleaned = clean_prompt(text).text
    assert cleaned == " ".join(cleaned.split())
    assert all(c.isprintable() or c in "\u200c\u200d" for c in cleaned)


def test_near_repeats_are_found_as_by_comparing_all() -> None:
    pool = texts(150)
    pool += [
        text.replace("ba", "be", i % 4).replace("rt", "rk", i % 3).upper() + "!" for i, text in enumerate(pool[:75])
    ]
    expected = []
    for place, text in enumerate(pool):
        kept = [i for i in range(place) if expected[i] is None]
        expected.append(
            next((i for i in kept if similarity(fold(pool[i]), fold(text)) >= THRESHOLD), None),
        )
    assert 20 < sum(place is not None for place in expected) < 75
    missed = [
        i for i, (a, b) in enumerate(zip(expected, find_near_repeats(pool), strict=True)) if (a is None) != (b is None)
    ]
    assert len(missed) <= 2


def test_vowel_signs_make_a_difference() -> None:
    assert fold("की") != fold("का")
    assert fold("A  Fox, (red)!") == fold("a fox red")


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    prompts = texts(20)
    rows = [{"caption": text, "style": f"s{i % 2}"} for i, text in enumerate(prompts)]
    source = tmp_path / "sources"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "b.json").write_text(json.dumps(rows))
    with (source / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["style", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), source / "d.parquet")
    results = []
    for file in sorted(source.iterdir()):
        out = tmp_path / file.suffix
        summary, *parts = imported(out, [file], column="caption", tags=["style"])
        assert (summary.read, summary.train, summary.eval) == (20, 15, 5)
        results.append(parts)
    assert all(result == results[0] for result in results)
    assert {prompt.tags["style"] for prompt in results[0][0]} == {"s0", "s1"}
    (tmp_path / "plain.txt").write_text("\n".join(prompts))
    summary, train, _ = imported(tmp_path / "txt", [tmp_path / "plain.txt"])
    assert [prompt.id for prompt in train] == [prompt.id for prompt in results[0][0]]
    summary, *parts = imported(tmp_path / "all", [source], column="caption", tags=["style"])
    assert (summary.read, summary.exact_repeats) == (80, 60) and parts == results[0]


def test_the_split_shares_no_near_repeat(tmp_path: Path) -> None:
    pool = texts(200, words=20)
    pool += [f"{text} {WORDS[i % 9]}" for i, text in enumerate(pool)]
    random.Random(1).shuffle(pool)
    (tmp_path / "pool.txt").write_text("\n".join(pool))
    summary, train, held_out = imported(tmp_path, [tmp_path / "pool.txt"], eval_count=50)
    check_disjoint(train, held_out)
    closest = max(similarity(fold(a.prompt), fold(b.prompt)) for a in train for b in held_out)
    assert closest < THRESHOLD and len(held_out) == 50
    assert 180 <= summary.near_repeats <= 200


def test_more_sources_move_few_held_out_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(300)))
    (tmp_path / "b.txt").write_text("\n".join(texts(10, seed=1)))
    _, _, first = imported(tmp_path / "1", [tmp_path / "a.txt"], eval_count=60)
    _, _, second = imported(tmp_path / "2", [tmp_path / "b.txt", tmp_path / "a.txt"], eval_count=60)
    assert len({prompt.id for prompt in first} & {prompt.id for prompt in second}) >= 50
    _, _, other = imported(tmp_path / "3", [tmp_path / "a.txt"], eval_count=60, seed=1)
    assert len({prompt.id for prompt in first} & {prompt.id for prompt in other}) < 30


def test_the_command_writes_the_files_of_params(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    (world / "mine.csv").write_text("caption,n\n" + "".join(f'"{text} --ar 3:2",1\n' for text in texts(12)) + ",2\n")
    command = ["prompts", "import", "mine.csv", "--column", "caption", "--eval", "4"]
    assert run(command) == 2
    assert capsys.readouterr().err == f"srpo: error: {world}/data/prompts/train.jsonl: exists; --force replaces it\n"
    assert run([*command, "--force"]) == 0
    printed = capsys.readouterr().out
    assert "read     13 prompts of mine.csv, 1 empty" in printed and "removed  --ar (12)" in printed
    assert "prompts have more than" in printed  # the base's tokenizer counted
    names = ("train.jsonl", "eval.jsonl", "import.json")
    changed = {path for path in world.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()}
    assert changed == {world / "mine.csv", *(world / "data/prompts" / name for name in names)}
    assert len(load_prompts(world / "data/prompts/train.jsonl")) == 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,n\nfox,1\n", "has no column 'prompt'; choose --column from text, n"),
        ("a.jsonl", '{"text": "fox"}\n', "has no key 'prompt'; choose --column from text"),
        ("a.jsonl", '{"prompt": \n', "can't be read"),
        ("a.json", '"fox"', "neither a list nor an object"),
        ("a.parquet", "PAR1", "can't be read"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.txt", "fox\nfox\n", "only 1 prompts are left of 2 read"),
        ("a.docx", "fox", "can't be read by its ending"),
    ],
)
def test_bad_sources_are_named(world: Path, capsys, name: str, content: str | bytes, words: str) -> None:
    (world / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (world / "data/prompts/train.jsonl").read_bytes()
    assert run(["prompts", "import", name, "--force"]) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1 and (world / "data/prompts/train.jsonl").read_bytes() == before


def test_the_hub_out_of_reach_is_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    assert run(["prompts", "import", "nobody/nothing-here", "--force"]) == 2  # the tests are offline
    line = capsys.readouterr().err
    assert line.startswith("srpo: error: nobody/nothing-here: can't be read from the Hub") and line.count("\n") == 1


def test_a_missing_source_is_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prompts", "import", "nothing.txt", "--force"]) == 2
    assert "nothing.txt: no such file or folder" in capsys.readouterr().err
