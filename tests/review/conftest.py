"""A finished campaign and its review server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from starlette.testclient import TestClient

from srpo.config.loader import load_params
from srpo.review.app import create_app
from srpo.rounds import BASE, Round
from tests.support.campaign import build_campaign

TOKEN = "a-token"
ORIGIN = "http://127.0.0.1:8765"


@pytest.fixture(scope="session")
def shared_campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    build_campaign(root)
    return root


@pytest.fixture
def campaign(shared_campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished campaign of one's own, as the current directory."""
    import shutil

    root = tmp_path / "project"
    shutil.copytree(shared_campaign, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def open_review(campaign: Path) -> Callable[..., TestClient]:
    """Return a function that starts a server of round 001 and returns a browser's side of it, with the cookie."""

    def start(against: str = BASE, signed_in: bool = True) -> TestClient:
        round = Round.of(load_params(campaign / "params.yaml"), campaign, "001")
        app = create_app(round, against, TOKEN, "srpo-review")
        client = TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN}, follow_redirects=True)
        if signed_in:
            assert client.get("/", params={"token": TOKEN}).status_code == 200
        return client

    return start


def pick(client: TestClient, item: str, picked: str | None, rater: str = "anna", **more: object):
    data = {"id": uuid4().hex, "rater": rater, "item": item, "picked": picked, "seconds": 2.5, "scores_shown": False}
    return client.post("/decide/picks", json=data | more)


def vote(client: TestClient, item: str, choice: str, rater: str = "anna", **more: object):
    data = {"id": uuid4().hex, "rater": rater, "item": item, "choice": choice, "seconds": 1.0}
    return client.post("/decide/votes", json=data | more)
