"""The report: one page that needs nothing else and believes no prompt."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from srpo.base import pin_base
from srpo.evaluate import evaluate
from srpo.generate import generate
from srpo.params import load_params
from srpo.report import report
from srpo.rounds import RoundFiles
from srpo.score import score
from srpo.select import select
from srpo.summary import campaign_table, render
from srpo.train import train
from tests.world import write_prompts


@pytest.fixture(scope="module")
def reported(shared_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reported") / "project"
    shutil.copytree(shared_world, root)
    text = (root / "params.yaml").read_text()
    accuracy = next(line for line in text.splitlines() if line.startswith("  accuracy:"))
    (root / "params.yaml").write_text(text.replace(accuracy + "\n", ""))  # it knows no prompts like these
    write_prompts(
        root / "data/prompts/train.jsonl", ["<script>alert(1)</script> & co", "مرحبا 🎈", "a b", "c d"], "train"
    )
    params = load_params(root / "params.yaml")
    pin_base(params, root)
    evaluate(params, root, "base")
    for stage in (generate, score, select, train, evaluate, report):
        stage(params, root, "001")
    return root


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_is_self_contained(reported: Path) -> None:
    page = (RoundFiles(reported, "001").report / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.targets and all(target.startswith("data:image/") for target in links.targets)
    assert "script" not in links.tags and "link" not in links.tags
    assert not re.search(r"url\(|@import", page)


def test_the_page_shows_verdict_gate_and_hashes(reported: Path) -> None:
    from srpo.lineage import read_lineage, read_metrics

    page = (RoundFiles(reported, "001").report / "index.html").read_text()
    metrics, lineage = read_metrics(reported, "001"), read_lineage(reported, "001")
    assert f'class="verdict {metrics["verdict"]}"' in page
    for rule in metrics["gate"]:
        assert rule in page
    assert lineage["adapter"] in page and lineage["winners"] in page


def test_the_same_files_give_the_same_report(reported: Path) -> None:
    folder = RoundFiles(reported, "001").report
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    report(load_params(reported / "params.yaml"), reported, "001")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert set(before) == {"index.html", "winners.png", "tuned.png"}
    assert Image.open(folder / "winners.png").width > 500


def test_the_table_has_a_row_per_evaluated_round(reported: Path) -> None:
    rows = campaign_table(reported)
    assert [row["round"] for row in rows] == ["base", "001"]
    assert [column.header for column in render(rows).columns] == [
        "round", "reward", "judge", "fid", "kid", "diversity", "verdict",
    ]  # fmt: skip
