"""Params and prompt files that nobody would write by hand: they are read, or refused in one line, and that is all."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from srpo import cli
from srpo.config.loader import load_params
from srpo.data.prompts import PROMPT_ID, load_prompts
from srpo.errors import UserError
from tests.faults.project import listing, write_params

REPO = Path(__file__).parents[2]
VALID = YAML(typ="safe").load((REPO / "params.yaml").read_text(encoding="utf-8"))
SPARE = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

ODD_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "a\nb", "../..", "/etc/passwd", "base", "~", "null", "\x1b[2J", "\u202e", "🎈", "x" * 9999]
    ),
)
ODD_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.0]),
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every key in a tree of mappings and lists."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return found + [place for key, value in items for place in places(value, (*path, key))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The shipped params with one to four keys dropped, added, renamed or given another value."""
    tree = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        known = places(tree)
        if not known:
            break
        *above, last = draw(st.sampled_from(known))
        at = tree
        for key in above:
            at = at[key]
        how = draw(st.sampled_from(["drop", "replace", "replace", "add", "rename"]))
        if how == "drop" or (how == "rename" and isinstance(at, list)):
            del at[last]
        elif how == "replace":
            at[last] = draw(ODD)
        elif isinstance(at, list):
            at.append(draw(ODD))
        else:
            at[draw(ODD_TEXTS)] = at.pop(last) if how == "rename" else draw(ODD)
    return tree


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def accepted(read, path: Path) -> Any:
    """What `read` makes of a file; None where it refuses it in one line that names it."""
    try:
        return read(path)
    except UserError as error:
        assert path.name in str(error) and str(error).isprintable() and len(str(error)) < 600
        return None


@SPARE
@given(tree=mutated())
def test_mutated_params_are_read_or_refused(tree: Any, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_params(folder, tree)
    params = accepted(load_params, folder / "params.yaml")
    if params is not None:  # what is accepted can be used: every round resolves, and it can be written down again
        for key in params.rounds:
            json.dumps(params.for_round(key).model_dump(), allow_nan=False)


@SPARE
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_as_params_are_refused(data: bytes, tmp_path_factory) -> None:
    path = written(tmp_path_factory.getbasetemp(), "params.yaml", data)
    assert accepted(load_params, path) is None


ROWS = st.one_of(
    ODD,
    st.fixed_dictionaries(
        {"id": st.one_of(st.from_regex(PROMPT_ID, fullmatch=True), ODD_TEXTS), "prompt": st.one_of(ODD_TEXTS, ODD)},
        optional={"tags": ODD, "promt": ODD},
    ),
    st.fixed_dictionaries({"id": st.from_regex(PROMPT_ID, fullmatch=True), "prompt": st.text(min_size=1)}),
)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=True).encode()),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
)


@SPARE
@given(lines=st.lists(LINES, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]))
def test_random_prompt_files(lines: list[bytes], end: bytes, tmp_path_factory) -> None:
    path = written(tmp_path_factory.getbasetemp(), "prompts.jsonl", end.join(lines))
    found = accepted(load_prompts, path)
    if found is not None:  # what is accepted can be used: names are names, and texts go into files
        assert found and len({prompt.id for prompt in found}) == len(found)
        for prompt in found:
            assert PROMPT_ID.fullmatch(prompt.id) and prompt.prompt.strip()
            json.dumps([prompt.prompt, prompt.tags], ensure_ascii=False).encode("utf-8")


@settings(SPARE, max_examples=40)
@given(tree=mutated(), lines=st.lists(LINES, min_size=1, max_size=3))
def test_invalid_command_lines(tree: Any, lines: list[bytes], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write_params(folder, tree)
    written(folder, "data/prompts/train.jsonl", b"\n".join(lines))
    before, said = listing(folder), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        # there is no candidate to select from and no eval prompt, so nothing here can succeed
        assert cli.run(["select", "001"]) == 2 and cli.run(["generate", "001"]) == 2
    errors = [line for line in said.getvalue().splitlines() if line]
    assert len(errors) == 2 and all(line.startswith("srpo: error: ") for line in errors)
    assert listing(folder) == before
