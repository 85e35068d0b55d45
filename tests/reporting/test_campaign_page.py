"""The campaign page: everything on one page, over whatever rounds there are."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from srpo import cli
from srpo.config.loader import load_params
from srpo.config.tree import branches
from srpo.data.records import read_sweep
from srpo.errors import UserError
from srpo.lineage.record import read_lineage
from srpo.reporting.campaign_page import write_campaign
from srpo.rounds import RoundFiles
from tests.support.campaign import PROMPTS, build_campaign

ROUNDS = ("001", "002", "002b")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built") / "project"
    build_campaign(root, ROUNDS)
    return root


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "project")


class Page(HTMLParser):
    """What a browser would see, after `srpo campaign`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.path = write_campaign(load_params(root / "params.yaml"), root)
        self.html = self.path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append((found["alt"], found["src"]))
        if "href" in found:
            self.links.append(found["href"])

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def charts(self) -> list[str]:
        return [base64.b64decode(uri.split(",")[1]).decode() for _, uri in self.images if "svg" in uri[:30]]


def test_page_is_self_contained_and_escaped(project: Path) -> None:
    page = Page(project)
    assert page.path == project / "rounds" / "index.html"
    assert page.images and all(uri.startswith("data:image/") for _, uri in page.images)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page.html)
    assert str(project) not in page.html and "<script>" not in page.html
    assert all(page.words.count(prompt.strip()) == 1 for prompt in PROMPTS)


def test_links_existing_reports(project: Path) -> None:
    assert Page(project).links == []
    for key in ("001", "002b"):
        RoundFiles(project, key).report.mkdir()
        (RoundFiles(project, key).report / "index.html").write_text("a report")
    page = Page(project)
    assert page.links == ["001/report/index.html", "002b/report/index.html"]
    assert all((page.path.parent / link).is_file() for link in page.links)


def test_rounds_have_numbers_intervals_hashes(project: Path) -> None:
    page = Page(project)
    for key in ROUNDS:
        found, lineage = read_sweep(RoundFiles(project, key))["2.0"], read_lineage(RoundFiles(project, key))
        assert f"{found['judge']:.3f}" in page.words
        assert f"{found['judge_low']:.3f} to {found['judge_high']:.3f}" in page.words
        assert {lineage["adapter"][:12], lineage["winners"][:12]} <= set(page.words)
    table = page.html[page.html.index("<h2>All rounds") :]
    places = [re.search(rf"[> ]{key}</td>", table).start() for key in ("base", *ROUNDS)]
    assert places == sorted(places), "a branch follows the trunk"
    assert table.count("&#8627;") == 1, "only 002b branches off"


def test_every_prompt_has_an_image_per_round(project: Path) -> None:
    alts = [alt for alt, uri in Page(project).images if "svg" not in uri[:30]]
    assert sorted(alts) == sorted(f"{key}: {prompt}" for key in ("base", *ROUNDS) for prompt in PROMPTS)


def test_missing_files_leave_gaps(project: Path) -> None:
    (RoundFiles(project, "001").evaluation / "samples.parquet").unlink()
    (RoundFiles(project, "001").evaluation / "guidance.csv").unlink()
    (RoundFiles(project, "001").evaluation / "gate.json").unlink()
    shutil.rmtree(RoundFiles(project, "001").adapter)
    page = Page(project)
    assert page.words.count("no sample") == len(PROMPTS)
    assert sum(alt.startswith("002: ") for alt, _ in page.images) == len(PROMPTS)


def test_damaged_samples_are_an_error(project: Path) -> None:
    (RoundFiles(project, "001").evaluation / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"001/evaluation/samples.parquet: not a readable parquet file"):
        Page(project)


def test_unevaluated_rounds_are_named(project: Path) -> None:
    shutil.rmtree(RoundFiles(project, "001").evaluation)
    page = Page(project)
    assert "Not evaluated yet: 001." in page.html
    assert not any(alt.startswith("001: ") for alt, _ in page.images)


def test_reward_hacking_has_a_banner(project: Path) -> None:
    assert "banner" not in re.sub(r"<style>.*</style>", "", Page(project).html, flags=re.DOTALL)
    path = RoundFiles(project, "002b").evaluation / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "fail", "finding": "reward hacking"}))
    page = Page(project)
    assert "Reward hacking: 002b" in page.words and "fail: reward hacking" in page.words
    assert any({"reward (selects)", "judge", "base to 002b"} <= set(re.findall(r">([^<>]+)</text>", svg))
               for svg in page.charts()), "no chart with both"  # fmt: skip


def test_page_is_deterministic(project: Path) -> None:
    before = Page(project).html
    code = "import sys; from srpo import cli; assert cli.run(['campaign']) == 0; print({'torch'} & {*sys.modules})"
    done = subprocess.run(  # another process, so that no seed or cache of this one helps
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert (project / "rounds/index.html").read_text(encoding="utf-8") == before
    assert done.stdout.split("\n")[:2] == ["rounds/index.html", "set()"]
    assert [path.name for path in (project / "rounds").iterdir() if path.is_file()] == ["index.html"]


def test_no_page_without_evaluated_base(project: Path, monkeypatch, capsys) -> None:
    shutil.rmtree(RoundFiles(project, "base").evaluation)
    monkeypatch.chdir(project)
    assert cli.run(["campaign"]) == 2
    assert "no round is evaluated yet" in capsys.readouterr().err
    assert not (project / "rounds/index.html").exists()


def test_tree_as_branches(built: Path) -> None:
    tree = load_params(built / "params.yaml").rounds
    spec = tree["001"]
    tree = tree | {"003": spec.model_copy(update={"parent": "002"}), "101": spec, "102": spec}
    tree |= {"102": spec.model_copy(update={"parent": "101"}), "003b": tree["003"]}
    assert branches(tree, ["base", *tree]) == [
        ["base", "001", "002", "003"], ["base", "101", "102"], ["001", "002b"], ["002", "003b"],
    ]  # fmt: skip
    assert branches(tree, ["base", "003", "003b"]) == [["base", "003"], ["base", "003b"]]
    assert branches(tree, ["base"]) == [["base"]]
