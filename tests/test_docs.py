"""What the documents name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from srpo.cli import app

REPO = Path(__file__).parent.parent
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's unmarked code blocks, as words without their comments."""
    # marked blocks are matched too, lest the end of one be taken for the start of an unmarked one
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for mark, block in blocks if not mark for line in block.splitlines() if re.match(r"[a-zA-Z.]", line)]
    return [words for line in lines if "─" not in line and (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_srpo_commands_and_make_targets_exist(page: Path) -> None:
    known = get_command(app).commands
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "srpo":
            assert words[1] in known, words
        if words[0] == "make":
            assert words[1] in targets, words


def test_the_readme_has_its_two_commands() -> None:
    assert [words[:2] for words in commands(REPO / "README.md")][:2] == [["make", "demo"], ["make", "test"]]


def test_every_module_has_its_line_in_contributing() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = {path.name for path in REPO.glob("srpo/*.py") if not path.name.startswith("__")}
    assert not {name for name in modules if name not in text}
