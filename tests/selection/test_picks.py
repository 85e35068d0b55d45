"""Picks in selection: what people picked wins, files that changed are refused, `select` and the commands together.

python -m pytest tests/selection/test_picks.py
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML
from starlette.testclient import TestClient

from srpo.cli import run
from srpo.config.loader import load_params
from srpo.config.schema import SelectParams
from srpo.data import parquet
from srpo.errors import UserError
from srpo.review.app import create_app
from srpo.rounds import BASE, Round
from srpo.selection.best_of_n import choose_winners
from srpo.selection.picks import Pick, picked_winners, read_picks, write_picks
from srpo.stages.select import select
from tests.review.conftest import ORIGIN, TOKEN, pick
from tests.support.campaign import build_campaign


def scores(table: dict[str, list[float]]) -> pl.DataFrame:
    rows = [(f"{key}-{i}", key, i, value) for key, values in table.items() for i, value in enumerate(values)]
    return pl.DataFrame(rows, schema=["candidate_id", "prompt_id", "index", "reward"], orient="row")


def picks_of(**picked: str | None) -> dict[str, Pick]:
    return {prompt: Pick(prompt, choice, None, ["anna"]) for prompt, choice in picked.items()}


def test_a_pick_wins_whatever_its_score() -> None:
    table = scores({"a": [1.0, 5.0, 3.0], "b": [1.0, 2.0, 3.0], "c": [float("nan"), 2.0, 1.0], "d": [1.0, 2.0, 3.0]})
    strict = SelectParams(min_margin=9.0, weighting="advantage", temperature=1.0)
    picks = picks_of(a="a-0", b="b-2", c="c-0", d=None)
    winners = picked_winners(table.lazy(), {"reward": 1.0}, strict, picks).sort("prompt_id")
    assert winners["candidate_id"].to_list() == ["a-0", "b-2", "c-0"]
    assert winners["loser_id"].to_list() == ["a-2", "b-0", "c-2"]  # never the winner itself
    assert winners["margin"].to_list() == [-2.0, 1.0, None]
    assert winners["weight"].to_list() == [1.0] * 3
    assert set(winners.columns) == set(choose_winners(table, {"reward": 1.0}, SelectParams()).columns)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = write_picks(tmp_path, list(picks_of(b="b-1", a=None).values()))
    assert read_picks(path, "001") == picks_of(a=None, b="b-1")
    assert write_picks(tmp_path, list(picks_of(a=None, b="b-1").values())) == path
    path.write_text(path.read_text().replace("b-1", "b-0"))
    for wrong, words in ((path, "changed since"), (tmp_path / "picks.jsonl", "picks-<hash>"), (path.with_name(
        "picks-0123456789abcdef.jsonl"), "restore it with Git")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_picks(wrong, "001")


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build_campaign(tmp_path, ("001",))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def browser(root: Path) -> TestClient:
    app = create_app(Round.of(load_params(root / "params.yaml"), root, "001"), BASE, TOKEN, "srpo-review")
    client = TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN})
    client.get("/", params={"token": TOKEN})
    return client


def set_picks(root: Path, value: str | None) -> Round:
    raw = YAML(typ="safe").load((root / "params.yaml").read_text())
    raw["rounds"]["001"]["select"] = {"picks": value} if value else {}
    (root / "params.yaml").write_text(json.dumps(raw))
    return Round.of(load_params(root / "params.yaml"), root, "001")


def test_select_follows_what_people_picked(campaign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Round.of(load_params(campaign / "params.yaml"), campaign, "001").files
    before = {row["prompt_id"]: row for row in parquet.read_rows(files.winners)}
    worst = before["train-0001"]["loser_id"]
    client = browser(campaign)
    assert run(["picks", "001"]) == 2
    assert "no picks yet" in capsys.readouterr().err
    for rater in ("anna", "ben"):
        pick(client, "train-0001", worst, rater)  # both prefer what the reward likes least
        pick(client, "train-0002", None, rater)  # and accept none of these
        pick(client, "train-0003", f"train-0003-{rater == 'anna':d}", rater)  # a tie
    assert run(["picks", "001"]) == 0
    printed = capsys.readouterr().out
    assert "1 prompts with a pick, 1 all bad, 1 left to the rewards" in printed
    name = printed.split("picks: ")[1].split("}")[0]
    select(set_picks(campaign, name))
    after = {row["prompt_id"]: row for row in parquet.read_rows(files.winners)}
    assert after["train-0001"]["candidate_id"] == worst and after["train-0001"]["loser_id"] != worst
    assert "train-0002" not in after
    same = ["train-0000", "train-0003", "train-0004"]
    assert [after[key]["candidate_id"] for key in same] == [before[key]["candidate_id"] for key in same]
    summary = json.loads((files.winners / "selection.json").read_text())
    assert (summary["picked"], summary["all_bad"], summary["winners"]) == (1, 1, 4)
    picked = [json.loads(line) for line in (campaign / name).read_text().splitlines()]
    assert [(row["prompt_id"], row["raters"]) for row in picked] == [
        ("train-0001", ["anna", "ben"]), ("train-0002", ["anna", "ben"])
    ]  # fmt: skip


def test_every_prompt_may_be_picked(campaign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = browser(campaign)
    for i in range(5):
        pick(client, f"train-{i:04d}", f"train-{i:04d}-3")
    run(["picks", "001"])
    round = set_picks(campaign, capsys.readouterr().out.split("picks: ")[1].split("}")[0])
    select(round)
    assert {row["index"] for row in parquet.read_rows(round.files.winners)} == {3}


def test_picks_of_other_images_are_refused(campaign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pick(browser(campaign), "train-0001", "train-0001-1")
    run(["picks", "001"])
    round = set_picks(campaign, capsys.readouterr().out.split("picks: ")[1].split("}")[0])
    from tests.support import campaign as support

    support._write_candidates(round.params, campaign, "001", size=24)  # as another `generate` would
    with pytest.raises(UserError, match="1 picks, such as train-0001-1, are of other images"):
        select(round)
    assert run(["picks", "001"]) == 2
    assert "1 picks, all of earlier candidates" in capsys.readouterr().err
