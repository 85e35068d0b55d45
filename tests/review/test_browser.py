"""The review pages in a real browser: keyboard, a killed server, two raters at once, phone widths.

python -m pytest tests/review/test_browser.py    needs playwright and a Chromium; skipped without
REVIEW_SCREENSHOTS=DIR keeps the screenshots.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import campaign as support
from tests.support.servers import free_port, kill

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
COUNT = 26
IMAGES_ARE_SHOWN = """async () => {
  const shown = [...document.images].filter((image) => image.checkVisibility() && image.loading !== "lazy");
  await Promise.all(shown.map((image) => image.decode()));
}"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished campaign of 26 prompts with 4 candidates each."""
    root = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "PROMPTS", [*support.PROMPTS, *(f"a red circle, number {i}" for i in range(COUNT - 5))])
        support.build_campaign(root, ("001",), size=64)
    return root


@contextmanager
def review(root: Path, port: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and the address that it printed."""
    command = [sys.executable, "-m", "srpo", "review", "001", "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        kill(process)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def rater(browser, address: str, name: str, **settings):
    """A browser of one's own, after the home page's form was filled in."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
    context.set_default_timeout(30_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    yield page
    context.close()
    # a server that was killed on purpose is the only thing to complain of
    assert [text for text in problems if "ERR_CONNECTION" not in text] == []


def press(page, key: str) -> None:
    """Press a key that leads to another page, and wait for it."""
    before = page.url
    page.keyboard.press(key)
    page.wait_for_url(lambda url: url != before)


def go(page, link: str) -> None:
    """Follow a link and wait for its page."""
    before = page.url
    page.get_by_role("link", name=link).first.click()
    page.wait_for_url(lambda url: url != before)


def keep(page, name: str) -> None:
    """Save a screenshot, and check that nothing sticks out on the right."""
    page.wait_for_load_state("networkidle")
    page.evaluate(IMAGES_ARE_SHOWN)
    if folder := os.environ.get("REVIEW_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name


def saved(root: Path, kind: str) -> list[dict]:
    files = (root / "review" / "001" / kind).glob("*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["at"])


def test_twenty_picks_by_keyboard_outlive_the_server(project: Path, browser) -> None:
    port = free_port()
    with review(project, port) as (server, address), rater(browser, address, "anna") as page:
        go(page, "Pick")
        keep(page, "pick-desktop")
        for number in range(10):
            press(page, str(number % 4 + 1))
        assert "10 of 26 prompts" in page.text_content("#progress")
        kill(server)
        stopped = page.url
        page.keyboard.press("2")
        sync_api.expect(page.locator("#problem")).to_contain_text("Not saved")
        keep(page, "server-gone")
        with review(project, port) as (_, again):
            assert again == address and page.url == stopped
            for number in range(9):
                press(page, "0" if number == 4 else "2")  # the first one again
            press(page, "u")
            press(page, "3")
            press(page, "ArrowLeft")
            sync_api.expect(page.locator(".chosen")).to_have_count(1)
            press(page, "ArrowRight")
            sync_api.expect(page.locator(".chosen")).to_have_count(0)
            press(page, "s")
            assert "accuracy" in page.text_content("figcaption >> nth=0")
            keep(page, "pick-scores")
            press(page, "1")
            assert "20 of 26 prompts" in page.text_content("#progress")
            go(page, "Round 001")
            go(page, "Pick")
            assert "21 of 26" in page.title()
    found = [row for row in saved(project, "picks") if row["rater"] == "anna"]
    undone = {row["undo"] for row in found if "undo" in row}
    standing = [row for row in found if "undo" not in row and row["id"] not in undone]
    assert len(undone) == 1 and len(standing) == len({row["item"] for row in standing}) == 20
    choices = [None if row["picked"] is None else int(row["picked"][-1]) + 1 for row in standing]
    assert choices == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 2, 2, 2, 2, None, 2, 2, 2, 3, 1]
    assert [row["scores_shown"] for row in standing] == [False] * 19 + [True]
    assert all(0 < row["seconds"] < 60 for row in standing)


def test_two_raters_compare_at_once(project: Path, browser) -> None:
    with (
        review(project, free_port()) as (_, address),
        rater(browser, address, "ben") as ben,
        rater(browser, address, "cleo") as cleo,
    ):
        for page in (ben, cleo):
            go(page, "Compare")
        keep(ben, "compare-desktop")
        for number in range(8):
            press(ben, "120"[number % 3])
            press(cleo, "1")
        assert "8 of 52 pairs" in ben.text_content("#progress") and "8 of 52" in cleo.text_content("#progress")
        go(ben, "Results")
        assert ben.get_by_text("Krippendorff's alpha is").is_visible()
        keep(ben, "results-desktop")
        ben.set_viewport_size({"width": 390, "height": 844})
        keep(ben, "results-phone")
    found = saved(project, "votes")
    assert Counter(row["rater"] for row in found) == {"ben": 8, "cleo": 8}
    items = {name: {row["item"] for row in found if row["rater"] == name} for name in ("ben", "cleo")}
    assert items["ben"] == items["cleo"] and len(items["ben"]) == 8


def test_a_phone_can_pick_and_browse(project: Path, browser) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with review(project, free_port()) as (_, address), rater(browser, address, "dora", **phone) as page:
        keep(page, "home-phone")
        go(page, "Pick")
        keep(page, "pick-phone")
        before = page.url
        page.get_by_label("Pick candidate 3").tap()
        page.wait_for_url(lambda url: url != before)
        page.get_by_label("Enlarge candidate 2").tap()
        keep(page, "zoom-phone")
        page.locator("#zoom img").tap()
        page.get_by_role("button", name="undo").tap()
        page.wait_for_url(before)
        go(page, "Compare")
        keep(page, "compare-phone")
        go(page, "Browse")
        keep(page, "browse-phone")
        page.set_viewport_size({"width": 1280, "height": 800})
        page.get_by_label("Show").select_option("winners")
        page.get_by_role("button", name="Apply").click()
        sync_api.expect(page.locator("#found")).to_have_text("26")
        keep(page, "browse-desktop")
    picks = [row for row in saved(project, "picks") if row["rater"] == "dora"]
    assert [row.get("picked", "undone") for row in picks] == ["train-0000-2", "undone"]
