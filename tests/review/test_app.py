"""The review pages through the ASGI client: deciding, resuming, undoing, filters, and what the page gives away.

python -m pytest tests/review/test_app.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.review.conftest import ORIGIN, TOKEN, pick, vote
from tests.support.campaign import CANDIDATES, PROMPTS


def lines(root: Path, kind: str) -> list[dict]:
    files = sorted((root / "review" / "001" / kind).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_pick_is_saved_with_what_was_shown(campaign: Path, open_review) -> None:
    client = open_review()
    answer = pick(client, "train-0001", "train-0001-2", seconds=3.217)
    assert answer.json() == {"next": "/pick?rater=anna&item=train-0002"}
    (line,) = lines(campaign, "picks")
    assert (line["rater"], line["item"], line["picked"], line["seconds"]) == (
        "anna",
        "train-0001",
        "train-0001-2",
        3.22,
    )
    assert [row["candidate_id"] for row in line["shown"]] == [f"train-0001-{i}" for i in range(CANDIDATES)]
    assert len({row["image"] for row in line["shown"]}) == CANDIDATES and line["scores_shown"] is False


def test_picking_goes_on_where_one_stopped(open_review) -> None:
    client = open_review()
    for i in range(2):
        pick(client, f"train-{i:04d}", None)
    client = open_review()  # a new server over the same files
    page = client.get("/pick", params={"rater": "anna"})
    assert page.url.params["item"] == "train-0002" and "2 of 5 prompts, about 1 min left" in page.text
    assert "0 of 5 prompts" in client.get("/pick", params={"rater": "ben"}).text
    for i in range(2, 5):
        last = pick(client, f"train-{i:04d}", f"train-{i:04d}-0")
    assert "All decided" in client.get(last.json()["next"]).text


def test_undo_takes_back_the_last_pick(campaign: Path, open_review) -> None:
    client = open_review()
    pick(client, "train-0000", "train-0000-1")
    pick(client, "train-0003", None)
    for item in ("train-0003", "train-0000"):
        answer = client.post("/undo/picks", json={"id": f"undo-{item}", "rater": "anna"})
        assert answer.json() == {"next": f"/pick?rater=anna&item={item}"}
    assert client.post("/undo/picks", json={"id": "undo-once-more", "rater": "anna"}).json() == {"next": None}
    assert "0 of 5 prompts" in client.get("/pick", params={"rater": "anna"}).text
    assert len(lines(campaign, "picks")) == 4  # nothing is taken out of the file


def test_a_request_sent_twice_counts_once(campaign: Path, open_review) -> None:
    client = open_review()
    for _ in range(2):
        assert pick(client, "train-0000", None, id="the-same-decision").status_code == 200
    assert len(lines(campaign, "picks")) == 1


def test_a_changed_mind_counts_last(campaign: Path, open_review) -> None:
    client = open_review()
    pick(client, "train-0000", "train-0000-1")
    pick(client, "train-0000", "train-0000-3")
    page = client.get("/pick", params={"rater": "anna", "item": "train-0000"}).text
    assert re.search(r'class="chosen">\s*<button class="image" data-choice="train-0000-3"', page)
    assert "1 of 5 prompts" in page


def test_scores_are_hidden_until_asked_for(open_review) -> None:
    client = open_review()
    query = {"rater": "anna", "item": "train-0001"}
    assert "accuracy" not in client.get("/pick", params=query).text
    assert "accuracy" in client.get("/pick", params=query | {"scores": "1"}).text


def test_texts_are_escaped(campaign: Path, open_review) -> None:
    client = open_review()
    for path in ("/pick?rater=anna&item=train-0000", "/browse", "/compare?rater=anna&item=base/eval-0000/0"):
        page = client.get(path)
        assert page.status_code == 200 and "<script>alert" not in page.text and "&lt;script&gt;alert" in page.text
    hostile = '"><script>alert(2)</script>'
    for path in ("/browse", "/results", "/"):
        assert "<script>alert" not in client.get(path, params={"rater": hostile, "text": hostile, "tag": hostile}).text


@pytest.mark.parametrize(
    "data",
    [
        {"picked": "train-0001-0"},  # of another prompt
        {"item": "nothing"},
        {"rater": "../../etc"},
        {"rater": ""},
        {"seconds": -1},
        {"seconds": "2"},
        {"id": "x"},
        {"scores_shown": "no"},
    ],
)
def test_nonsense_is_refused(campaign: Path, open_review, data: dict) -> None:
    known = {"item": "train-0000", "picked": "train-0000-1"}
    client = open_review()
    answer = pick(client, **(known | data))
    assert answer.status_code == 400 and "\n" not in answer.text
    assert client.post("/decide/picks", content="{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/decide/picks", json=[1]).status_code == 400
    assert lines(campaign, "picks") == []


def test_pairs_are_blind_and_their_sides_vary(campaign: Path, open_review) -> None:
    client = open_review()
    left = []
    for _ in range(2 * len(PROMPTS)):
        page = client.get("/compare", params={"rater": "anna"})
        shown = page.text[page.text.index("<main") :]
        text = re.sub(r"base/eval-\d+/\d|base%2F", "", shown)  # the pair's name, the same on both sides
        assert "base" not in text and "001" not in text.replace("eval-0001", "")
        assert vote(client, page.url.params["item"], "left").status_code == 200
    found = lines(campaign, "votes")
    left = [line["shown"]["left"]["model"] for line in found]
    assert all(line["winner"] == side for line, side in zip(found, left, strict=True))
    assert 2 <= left.count("base") <= 8
    digests = images(campaign)
    for line in found:
        for side in line["shown"].values():
            assert digests[side["model"], line["prompt_id"], line["index"]] == side["image"]


def test_an_image_of_a_pair_is_its_models(campaign: Path, open_review) -> None:
    import hashlib

    client = open_review(against="002")
    page = client.get("/compare", params={"rater": "ben"})
    address = re.search(r'data-zoom="(/pair/\d+/right[^"]*)"', page.text)[1]
    image = client.get(address)
    vote(client, page.url.params["item"], "equal", "ben")
    (line,) = lines(campaign, "votes")
    assert line["shown"]["right"]["image"] == hashlib.sha256(image.content).hexdigest()
    assert {side["model"] for side in line["shown"].values()} == {"001", "002"} and line["winner"] is None


def test_another_evaluation_asks_again(campaign: Path, open_review) -> None:
    client = open_review()
    vote(client, "base/eval-0000/0", "left")
    pick(client, "train-0000", None)
    from tests.support.campaign import load_params, write_evaluation

    write_evaluation(load_params(campaign / "params.yaml"), campaign, "001", size=24)
    client = open_review()
    assert "0 of 10 pairs" in client.get("/compare", params={"rater": "anna"}).text
    assert "1 of 5 prompts" in client.get("/pick", params={"rater": "anna"}).text
    assert "1 votes about images of earlier evaluations do not count" in client.get("/results").text


def test_browse_filters_and_sorts(campaign: Path, open_review) -> None:
    client = open_review()

    def shown(**query: str) -> list[str]:
        return re.findall(r"Enlarge (train-\d+-\d)", client.get("/browse", params=query).text)

    scores = pl.read_parquet(campaign / "rounds/001/scores/judge/judge.parquet").sort("judge", descending=True)
    assert len(shown()) == 20
    assert shown(text="RED circle") == [f"train-0001-{i}" for i in range(4)]
    assert len(shown(show="winners")) == 5 and shown(show="invalid") == []
    assert shown(sort="highest", reward="judge")[:5] == scores["candidate_id"].to_list()[:5]
    high = scores.filter(pl.col("judge") >= 0.6)["candidate_id"].to_list()
    assert sorted(shown(reward="judge", least="0.6")) == sorted(high)
    assert len(shown(sort="disagreement")) == 20
    assert shown(page="99999999", least="x", sort="?", reward="?") == shown()


def test_a_round_without_scores_can_be_picked(campaign: Path, open_review) -> None:
    shutil.rmtree(campaign / "rounds/001/scores")
    client = open_review()
    assert pick(client, "train-0000", "train-0000-1").status_code == 200
    assert client.get("/browse").status_code == client.get("/results").status_code == 200


def test_requests_from_elsewhere_are_refused(campaign: Path, open_review) -> None:
    client = open_review(signed_in=False)
    assert client.get("/").status_code == client.get("/candidate/0").status_code == 403
    assert client.get("/", params={"token": "another"}).status_code == 403
    assert pick(client, "train-0000", None).status_code == 403
    client = open_review()
    assert client.get("/candidate/0").status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1:80@evil.example", ""):
        assert client.get("/", headers={"Host": host}).status_code == 421  # DNS rebinding
    data = {
        "id": "a-decision",
        "rater": "anna",
        "item": "train-0000",
        "picked": None,
        "seconds": 1,
        "scores_shown": False,
    }
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        assert client.post("/decide/picks", json=data, headers={"Origin": origin}).status_code == 403
    form = {"Content-Type": "text/plain"}
    assert client.post("/decide/picks", content=json.dumps(data), headers=form).status_code == 415
    assert client.post("/decide/picks", json=data | {"rater": "x" * 70_000}).status_code == 413
    assert client.put("/pick").status_code == 405
    assert lines(campaign, "picks") == []
    assert client.post("/decide/picks", json=data, headers={"Origin": ORIGIN}).status_code == 200


def test_answers_forbid_what_they_need_not(open_review) -> None:
    client = open_review()
    for path in ("/", "/candidate/0", "/static/review.js", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert client.get("/static/../app.py").status_code == client.get("/candidate/999").status_code == 404
    cookie = (
        open_review(signed_in=False).get("/", params={"token": TOKEN}, follow_redirects=False).headers["set-cookie"]
    )
    assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()


def test_pages_load_nothing_from_elsewhere(open_review) -> None:
    client = open_review()
    static = Path(__file__).parents[2] / "srpo" / "review" / "static"
    texts = [file.read_text() for file in static.iterdir()]
    texts += [client.get(path).text for path in ("/", "/pick?rater=anna", "/compare?rater=anna", "/browse", "/results")]
    for text in texts:
        assert not re.search(r"https?://(?!www.w3.org/2000/svg)|style=|onclick=|innerHTML", text)


def images(root: Path) -> dict[tuple[str, str, int], str]:
    import hashlib

    found = {}
    for key in ("base", "001"):
        for row in pl.read_parquet(root / f"rounds/{key}/evaluation/samples.parquet").iter_rows(named=True):
            found[key, row["prompt_id"], row["index"]] = hashlib.sha256(row["image"]["bytes"]).hexdigest()
    return found
