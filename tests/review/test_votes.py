"""Votes of people from the page to gate, report, campaign page, MLflow's records and promotion.

python -m pytest tests/review/test_votes.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.promote import _describe
from srpo.cli import run
from srpo.config.loader import load_params
from srpo.data.records import read_gate, read_metrics
from srpo.errors import UserError
from srpo.release import registry
from srpo.reporting.campaign_page import write_campaign
from srpo.review.pairs import on_the_left
from srpo.review.state import Review
from srpo.rounds import BASE, Round
from srpo.stages.gate import gate
from srpo.stages.report import report
from srpo.storage.json_files import write_json
from srpo.tracking.records import round_record
from tests.review.conftest import vote
from tests.support.campaign import write_dvc_lock, write_evaluation

PAIRS = 10


@pytest.fixture
def voted(campaign: Path, open_review: Callable, capsys: pytest.CaptureFixture[str]) -> str:
    """The file of frozen votes: of 10 pairs anna prefers the round's 9 times, ben the same except for one equal."""
    vote_all(campaign, open_review)
    capsys.readouterr()
    assert run(["votes", "001", "--freeze"]) == 0
    return frozen(capsys)


def vote_all(root: Path, open_review: Callable, losses: int = 1) -> None:
    client, round = open_review(), round_of(root)
    for rater in ("anna", "ben"):
        for number, pair in enumerate(Review(round, BASE).pairs):
            own = "right" if on_the_left(pair, round.key, rater) else "left"
            other = "left" if own == "right" else "right"
            choice = other if number < losses else "equal" if (rater, number) == ("ben", losses) else own
            assert vote(client, pair.item, choice, rater).status_code == 200


def frozen(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr().out
    assert "20 votes against base" in printed
    return printed.split('votes: {"001": ')[1].split("}")[0]


def round_of(root: Path, **limits: Any) -> Round:
    raw = json.loads((root / "params.yaml").read_text())
    raw["gate"] |= limits
    (root / "params.yaml").write_text(json.dumps(raw))
    return Round.of(load_params(root / "params.yaml"), root, "001")


def decide(root: Path, **limits: Any) -> dict[str, Any]:
    round = round_of(root, **limits)
    for key in ("001", BASE):
        write_json(root / "rounds" / key / "evaluation" / "drift.json", {"drift": 1.0, "drift_kid": 0.1})
    gate(round)
    return read_gate(round.files)


def test_votes_say_who_wins_and_which_reward_agrees(campaign: Path, voted: str) -> None:
    human = decide(campaign, votes={"001": voted})["human"]
    assert (human["votes"], human["prompts"], human["raters"]) == (20, 5, 2)
    assert human["win_rate"]["value"] == pytest.approx(17.5 / 20)
    assert human["win_rate"]["low"] < 17.5 / 20 < human["win_rate"]["high"] <= 1
    assert 0.5 < human["alpha"] < 1
    assert human["agreement"]["judge"]["value"] == pytest.approx(17 / 19)  # the judge prefers the round everywhere
    metrics = read_metrics(round_of(campaign).files)
    assert metrics["human_win_rate"] == human["win_rate"]["value"] and metrics["human_votes"] == 20
    assert metrics["judge_human_agreement"] == pytest.approx(17 / 19)


def test_the_rule_needs_enough_votes(campaign: Path, voted: str) -> None:
    silent = decide(campaign, min_human_win_rate=0.99)
    assert silent["human"] is None and "human_win_rate" not in silent["rules"]
    few = decide(campaign, min_human_win_rate=0.99, votes={"001": voted})
    assert few["human"]["votes"] == 20 and "human_win_rate" not in few["rules"]
    enough = decide(campaign, min_human_win_rate=0.99, min_human_votes=20)["rules"]["human_win_rate"]
    assert enough["limit"] == 0.99 and not enough["passed"]
    assert enough["value"] == few["human"]["win_rate"]["low"]
    assert decide(campaign, min_human_win_rate=0.5)["rules"]["human_win_rate"]["passed"]


def test_votes_count_as_they_were_frozen(campaign: Path, voted: str, open_review, capsys) -> None:
    first = decide(campaign, votes={"001": voted})["human"]
    vote_all(campaign, open_review, losses=4)  # they change their minds
    assert decide(campaign)["human"] == first
    capsys.readouterr()
    assert run(["votes", "001", "--freeze"]) == 0
    again = frozen(capsys)
    assert again != voted
    assert decide(campaign, votes={"001": again})["human"]["win_rate"]["value"] == pytest.approx(11.5 / 20)


def test_votes_about_other_images_are_refused(campaign: Path, voted: str) -> None:
    round = round_of(campaign, votes={"001": voted})
    write_evaluation(round.params, campaign, "001", size=24)
    with pytest.raises(UserError, match=r"^gate\.votes\.001: .* votes about other images .* `srpo review 001`"):
        decide(campaign)


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ({"009": "x"}, r"gate\.votes\.009: no such round; rounds has 001"),
        ({"001": "review/001/picks-0123456789abcdef.jsonl"}, r"gate\.votes\.001: .*: not a file of votes"),
        ({"001": "review/001/votes-0123456789abcdef.jsonl"}, r"gate\.votes\.001: .* No such file"),
    ],
)
def test_a_wrong_file_is_one_line(campaign: Path, votes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        decide(campaign, votes=votes)
    assert "\n" not in str(error.value)


def test_without_votes_there_is_nothing_to_freeze(campaign: Path, capsys) -> None:
    assert run(["votes", "001", "--freeze"]) == 2
    assert "review/001/votes: no votes yet; `srpo review 001`" in capsys.readouterr().err


def test_pages_and_records_show_people(campaign: Path, voted: str) -> None:
    decide(campaign)
    assert "agrees with people" not in write_campaign(load_params(), campaign).read_text()
    decide(campaign, votes={"001": voted}, min_human_win_rate=0.5, min_human_votes=20)
    report(round_of(campaign))
    text = " ".join((campaign / "rounds/001/report/index.html").read_text().split())
    if shots := os.environ.get("REVIEW_SCREENSHOTS"):
        shutil.copytree(campaign / "rounds/001/report", Path(shots) / "report", dirs_exist_ok=True)
        shutil.copy(write_campaign(load_params(), campaign), shots)
    assert "20 blind votes of 2 people on 5 held-out prompts" in text and "Share of votes by people" in text
    text = write_campaign(load_params(), campaign).read_text()
    assert "Which reward agrees with people?" in text and 'data-name="human_win_rate">0.875<small>' in text
    record = round_record(round_of(campaign))
    assert record is not None
    points = {name: value for name, value, _ in record.curves["evaluation"]}
    assert points["human_win_rate"] == 0.875 and points["human_votes"] == 20 and "judge_human_agreement" in points


def test_promotion_shows_votes_and_may_require_them(campaign: Path, voted: str) -> None:
    decide(campaign)
    write_dvc_lock(load_params(), campaign, ("001",))
    round = round_of(campaign, require_human_votes=True, min_human_votes=20)
    assert "People: no votes count in the gate" in _describe("001", "ad" * 32, None)
    with pytest.raises(UserError, match=r"counts 0 votes of people, and gate\.min_human_votes asks for 20; vote with"):
        registry.check(round)
    assert registry.check(round, override="the page was down")
    decide(campaign, votes={"001": voted})
    write_dvc_lock(load_params(), campaign, ("001",))
    assert registry.check(round_of(campaign))
    form = _describe("001", "ad" * 32, None)
    assert "People: win rate over base **0.875**" in form and "20 votes on 5 prompts, raters: 2" in form
