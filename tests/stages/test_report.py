"""The report page: self-contained, with prompts escaped."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srpo.config.loader import load_params
from srpo.data.records import read_gate, read_sweep
from srpo.errors import UserError
from srpo.lineage.record import read_lineage
from srpo.reporting import charts, contact_sheets
from srpo.reporting.table import best_rows, campaign_table, render, show
from srpo.rounds import Round, RoundFiles
from srpo.stages.report import report
from tests.support.campaign import PROMPTS, build_campaign


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reported") / "project"
    report(Round.of(build_campaign(root), root, "002"))
    return root


@pytest.fixture
def project(reported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(reported, tmp_path / "project")


class Page(HTMLParser):
    """What a browser would see: tags, links and words."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.html = (RoundFiles(root, "002").report / "index.html").read_text(encoding="utf-8")
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_is_self_contained(reported: Path) -> None:
    page = Page(reported)
    assert page.targets and all(target.startswith("data:image/") for target in page.targets)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import", page.html)
    assert str(reported) not in page.html


def test_prompts_are_escaped(reported: Path) -> None:
    page = Page(reported)
    assert "<script>" not in page.html
    # once among the held-out prompts, once among the winners
    assert all(page.words.count(prompt.strip()) == 2 for prompt in PROMPTS)


def test_page_shows_verdict_gate_hashes(reported: Path) -> None:
    page, gate, lineage = (
        Page(reported),
        read_gate(RoundFiles(reported, "002")),
        read_lineage(RoundFiles(reported, "002")),
    )
    assert f'class="verdict {gate["verdict"]}"' in page.html
    looks = {f"{name}_shift" for name in gate["image_stats"]}
    for name, rule in gate["rules"].items():
        assert name in looks or (name in page.words and f"{rule['value']:.3f}" in page.words)
    assert page.words.count("passed") == len(gate["rules"])
    assert {lineage["adapter"], lineage["winners"], lineage["parent_adapter"], lineage["code"]} <= set(page.words)


def test_page_shows_intervals_and_image_stats(reported: Path) -> None:
    words, sweep = Page(reported).words, read_sweep(RoundFiles(reported, "002"))["2.0"]
    for name in ("judge", "kid", "cmmd", "diversity"):
        assert f"{sweep[f'{name}_low']:.3f} to {sweep[f'{name}_high']:.3f}" in words, name
    gate = read_gate(RoundFiles(reported, "002"))
    rate = gate["win_rate"]["judge"]["parent"]
    assert f"{rate['low']:.3f} to {rate['high']:.3f}" in words
    for name, look in gate["image_stats"].items():
        assert name.replace("_", " ") in words and f"{look['z']:+.2f}" in words


def test_failed_rules_are_shown(project: Path) -> None:
    assert "Reward hacking" not in Page(project).words and "failed" not in Page(project).words
    path = RoundFiles(project, "002").evaluation / "gate.json"
    gate = json.loads(path.read_text()) | {"verdict": "fail", "finding": "reward hacking"}
    gate["rules"]["fid_ratio"] |= {"passed": False, "value": 1.25}
    path.write_text(json.dumps(gate))
    report(Round.of(load_params(project / "params.yaml"), project, "002"))
    page = Page(project)
    banner = page.html[page.html.index('class="banner"') : page.html.index("Is it better?")]
    assert "Reward hacking" in banner and re.search(r"fid_ratio</code> 1\.250 \(at most 1\.000\)\.", banner)
    assert page.words.count("failed") == 1


def test_charts_show_base_parent_round(reported: Path) -> None:
    svgs = [base64.b64decode(target.split(",")[1]).decode() for target in Page(reported).targets if "svg" in target]
    words = [set(re.findall(r">([^<>]+)</text>", svg)) for svg in svgs]
    for name in ("reward", "judge", "accuracy", "fid"):
        assert any({name, "base", "001", "002"} <= found for found in words), f"no curve of {name} over rounds"
        assert any({name, "base", "round 001", "round 002", "guidance"} <= found for found in words), "no sweep"
    assert any({"candidates", "winners"} <= found for found in words)
    assert any("training loss" in found for found in words)


def test_the_charts_show_intervals() -> None:
    known = {key: {"kid": kid, "kid_low": 0.1, "kid_high": 0.4} for key, kid in (("base", 0.3), ("001", 0.2))}
    bare = {key: {"kid": row["kid"]} for key, row in known.items()}
    path = [["base", "001"]]
    assert charts.over_rounds(known, path, "kid") != charts.over_rounds(bare, path, "kid")
    known, bare = ({key: {"1.0": row, "2.0": row} for key, row in rows.items()} for rows in (known, bare))
    assert charts.sweep(known, "kid").count("FillBetween") == 2
    assert "FillBetween" not in charts.sweep(bare, "kid")


def test_missing_numbers_are_not_drawn() -> None:
    rows = {"base": {"kid": float("nan")}, "001": {"kid": None}, "002": {}}
    empty = charts.over_rounds(rows, [["base", "001"], ["base", "002"]], "kid")
    assert "kid" in empty and "nan" not in empty.lower()


def test_report_is_deterministic(project: Path) -> None:
    folder = RoundFiles(project, "002").report
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == {"index.html", "winners.png", "tuned.png"}
    code = "import sys; from pathlib import Path\n"
    code += "from srpo.config.loader import load_params; from srpo.stages.report import report\n"
    code += "from srpo.rounds import Round\n"
    code += "report(Round.of(load_params('params.yaml'), Path(), '002'))\n"
    code += "print({'torch', 'diffusers', 'mlflow'} & set(sys.modules))"
    repo = Path(__file__).parents[2]
    done = subprocess.run(  # another process, so that no seed or cache of this one helps
        [sys.executable, "-c", code], cwd=project, env={"PYTHONPATH": str(repo), "PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert done.stdout.strip() == "set()", "slow to import"


def test_reads_only_base_parent_and_round(project: Path) -> None:
    before = (RoundFiles(project, "002").report / "index.html").read_bytes()
    for needless in ("001/candidates", "001/winners", "001/adapter", "001/evaluation/samples.parquet",
                     "001/evaluation/per_prompt.parquet"):  # fmt: skip
        path = project / "rounds" / needless
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report(Round.of(load_params(project / "params.yaml"), project, "002"))
    assert (RoundFiles(project, "002").report / "index.html").read_bytes() == before


def test_missing_numbers_do_not_stop_the_report(project: Path) -> None:
    path = RoundFiles(project, "002").evaluation / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diversity": float("nan"), "kid": None}))
    report(Round.of(load_params(project / "params.yaml"), project, "002"))
    assert {"nan", "-"} <= set(Page(project).words)


def test_scores_are_shown_by_tag(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo.reporting.tags.MIN_PROMPTS", 2)
    params = load_params(project / "params.yaml")
    path = project / params.prompts.eval
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = ["<b>round</b>", "<b>round</b>", "square", "square", "rare"]
    lines = [json.dumps(row | {"tags": {"shape": kind}}) for row, kind in zip(rows, kinds, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    report(Round.of(params, project, "002"))
    page = Page(project)
    assert {"By kind of prompt", "shape", "<b>round</b>", "square"} <= set(page.words)
    assert "rare" not in page.words


def test_scores_of_another_run_are_an_error(project: Path) -> None:
    shutil.copy(project / "rounds/001/candidates/shard-00000.parquet", project / "rounds/002/candidates")
    for shard in ("shard-00001.parquet", "shard-00002.parquet"):
        (project / "rounds/002/candidates" / shard).unlink()
    with pytest.raises(UserError, match=r"candidates: lacks 'train-000\d-\d'"):
        report(Round.of(load_params(project / "params.yaml"), project, "002"))


def test_thumbnails() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    enlarged = np.asarray(contact_sheets.thumbnail(Image.fromarray(pixels)))
    assert np.array_equal(enlarged, pixels.repeat(2, axis=0).repeat(2, axis=1))
    assert contact_sheets.thumbnail(Image.new("RGB", (1024, 768))).size == (256, 192)


def test_contact_sheet_has_every_pair(reported: Path) -> None:
    params = load_params(reported / "params.yaml")
    pairs = contact_sheets.winners_and_losers(params, RoundFiles(reported, "002"))
    assert len(pairs) == len(PROMPTS)
    assert all(float(pair.left_lines[0].split()[1]) >= float(pair.right_lines[0].split()[1]) for pair in pairs)
    assert [line.split()[0] for line in pairs[0].left_lines] == ["reward", "judge", "accuracy"]
    chosen = contact_sheets.winners_and_losers(params, RoundFiles(reported, "002"), count=3)
    assert chosen[0].prompt == pairs[0].prompt and chosen[-1].prompt == pairs[-1].prompt, "the ends are shown"
    assert Image.open(RoundFiles(reported, "002").report / "winners.png").width > 4 * 2 * contact_sheets.TINY


def test_large_numbers_have_fewer_decimals() -> None:
    assert [show(value) for value in (0.12345, -9.99, 83.123, -123.45, 3, None)] == [
        "0.123", "-9.990", "83.12", "-123.5", "3", "-",
    ]  # fmt: skip


def test_table_has_a_row_per_round(reported: Path) -> None:
    rows = campaign_table(reported)
    assert [row["round"] for row in rows] == ["base", "001", "002"]
    assert [column.header for column in render(rows).columns] == [
        "round", "reward", "judge", "accuracy", "fid", "kid", "cmmd", "diversity", "drift", "verdict",
    ]  # fmt: skip


def test_models_are_compared_at_their_own_best_guidance(reported: Path) -> None:
    params = load_params(reported / "params.yaml")
    base, first, second = best_rows(reported, params)
    assert base["round"] == "base" and base["judge > base"] is None and base["judge > parent"] is None
    assert list(second) == [
        "round", "reward", "judge", "accuracy", "fid", "judge > base", "judge > parent", "accuracy > base",
        "accuracy > parent",
    ]  # fmt: skip
    for row in (base, first, second):
        sweep = read_sweep(RoundFiles(reported, row["round"])).values()
        assert row["accuracy"] == max(values["accuracy"] for values in sweep)
        assert row["fid"] == min(values["fid"] for values in sweep)
    rates = read_gate(RoundFiles(reported, "002"))["win_rate"]["judge"]
    assert (second["judge > base"], second["judge > parent"]) == (rates["best"]["value"], rates["parent_best"]["value"])
