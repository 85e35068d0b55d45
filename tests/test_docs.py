"""Documentation: links, commands, and the pages generated from the code.

python -m pytest tests/test_docs.py
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from docs import hooks
from srpo.cli import app
from srpo.config.loader import Params
from srpo.data.schemas import CANDIDATE_FIELDS

REPO = Path(__file__).parent.parent
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO))


GENERATED = {REPO / "docs" / hooks.PARAMS_PAGE, REPO / "docs" / hooks.CLI_PAGE}


def commands(page: Path) -> list[list[str]]:
    """Return this project's commands in a page's unmarked code blocks, as words without prompt and comment."""
    # marked blocks are matched too, else the end of one would be taken for the start of an unmarked one
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shell = "\n".join(block for mark, block in blocks if not mark)
    whole = re.sub(r"\\\n\s*", "", shell)  # a backslash at its end continues a line
    lines = re.findall(r"^(?:\$ )?((?:srpo|make|python -m) .*)", whole, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def section_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a section and of the sections inside it, without the names of rounds and rewards."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from section_keys(inner, f"{prefix}{name}.")


def sections_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve()
        assert target.startswith("https://") or file.exists() or file in GENERATED, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    known = get_command(app).commands
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands(page):
        if program == "srpo":
            command = known[words[0]]
            command = getattr(command, "commands", {}).get(words[1] if words[1:] else "", command)
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, words
        elif program == "make":
            assert words[0] in targets, words
        else:
            assert find_spec(words[1]), words


def test_the_readme_has_its_two_commands() -> None:
    assert [words[:2] for words in commands(REPO / "README.md")][:2] == [["make", "demo"], ["make", "test"]]


def test_the_params_page_has_every_key() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", hooks.params_page(), re.MULTILINE)
    shown = [re.sub(r"\[\]|\.<name>", "", key) for key in rows]
    assert sorted(shown) == sorted(section_keys(Params))


def test_the_commands_page_has_every_command() -> None:
    page = hooks.cli_page()
    assert [name for name in get_command(app).commands if f"## `srpo {name}`" not in page] == []


def test_the_datasets_page_has_every_column() -> None:
    page = (REPO / "docs" / "reference" / "datasets.md").read_text(encoding="utf-8")
    assert [name for name in CANDIDATE_FIELDS if f"`{name}`" not in page] == []


def test_every_decision_is_in_the_index() -> None:
    numbers = re.findall(r"^\| (\d+) \| \[", hooks.decisions_table(), re.MULTILINE)
    assert len(numbers) > 60 and [int(number) for number in numbers] == sorted({int(number) for number in numbers})
