"""What the documents name exists."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from srpo.cli import app

REPO = Path(__file__).parent.parent
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])


def commands(page: Path) -> list[list[str]]:
    """This project's commands in a page's unmarked code blocks, as words without prompt and comment."""
    # marked blocks are matched too, else the end of one would be taken for the start of an unmarked one
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shell = "\n".join(block for mark, block in blocks if not mark)
    whole = re.sub(r"\\\n\s*", "", shell)  # a backslash at its end continues a line
    lines = re.findall(r"^(?:\$ )?((?:srpo|make|python -m) .*)", whole, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    known = get_command(app).commands
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands(page):
        if program == "srpo":
            options = {option for parameter in known[words[0]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, words
        elif program == "make":
            assert words[0] in targets, words
        else:
            assert find_spec(words[1]), words


def test_the_readme_has_its_two_commands() -> None:
    assert [words[:2] for words in commands(REPO / "README.md")][:2] == [["make", "demo"], ["make", "test"]]
