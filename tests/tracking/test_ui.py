"""What a reviewer sees first in MLflow's UI, in a real browser.

python -m pytest tests/tracking/test_ui.py    needs playwright and a Chromium; skipped without
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest

from srpo.tracking.records import headline_names
from srpo.tracking.sync import sync_campaign
from tests.support.servers import free_port, mlflow_server
from tests.tracking.test_sync import campaign, client_of, params_of, project, runs_of

__all__ = ["campaign", "project"]

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
PATIENCE = 120_000  # milliseconds


def test_rounds_open_with_their_headline_numbers(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "srpo")
    params, port = params_of(project), free_port()
    sync_campaign(params, project)
    (address,) = re.findall(r"the rounds are at (\S+)", caplog.text)
    (run,) = [run for run in runs_of(client_of(project)) if run.info.run_name == "round 001"]
    experiment, _, query = address.removeprefix("http://127.0.0.1:5000").partition("/runs")
    with (
        mlflow_server(tmp_path, port, f"sqlite:///{project}/mlflow.db"),
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 2600, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{port}{experiment}/runs{query}")
        for name in [*headline_names(params), "srpo.verdict"]:
            page.locator(".ag-header").get_by_text(name, exact=True).first.wait_for()
        for name in ("Source", "Dataset", "Models"):  # MLflow's own columns
            assert page.locator(".ag-header").get_by_text(name, exact=True).count() == 0
        page.goto(f"http://127.0.0.1:{port}{experiment}/runs/{run.info.run_id}?workflowType=machine_learning")
        page.get_by_text(run.data.tags["mlflow.note.content"].partition("\n")[0]).wait_for()
        page.goto(f"http://127.0.0.1:{port}{experiment}/runs/{run.info.run_id}/model-metrics{query}")
        page.get_by_text("sweep/accuracy").first.wait_for()
