"""Passwords in addresses and tokens in the environment stay where they are; other people's text stays text."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from srpo import cli
from srpo.rounds import Round
from tests.faults.project import content, param
from tests.support.campaign import build_campaign

PASSWORD = "hunter2-at-home"
TOKENS = {
    "HF_TOKEN": "hf_NeverTellAnyone",
    "AWS_SECRET_ACCESS_KEY": "aws-NeverTellAnyone",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-NeverTellAnyone",
    "PREFECT_API_KEY": "pnu_NeverTellAnyone",
}
SECRETS = (PASSWORD, "NeverTellAnyone")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn campaign; read only."""
    root = tmp_path_factory.mktemp("built")
    build_campaign(root, ("001",))
    return root


@pytest.fixture
def project(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the drawn campaign as the current directory, with secrets in the environment."""
    shutil.copytree(built, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "project"


def leaks(root: Path) -> list[str]:
    """Files of the project that hold a secret; params.yaml is the user's own."""
    files = (file for file in root.rglob("*") if file.is_file() and file.name != "params.yaml")
    return [str(file) for file in files for secret in SECRETS if secret.encode() in file.read_bytes()]


@pytest.mark.slow  # MLflow's client waits between its tries
@pytest.mark.parametrize(
    "uri",
    [
        f"http://someone:{PASSWORD}@with@127.0.0.1:9/path",
        f"http://127.0.0.1:9/?token={PASSWORD}",
        f"postgresql+psycopg2://someone:{PASSWORD}@127.0.0.1:9/mlflow",
    ],
)
def test_password_in_the_address_is_redacted(
    uri: str, project: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    from srpo.config.loader import load_params
    from srpo.preflight import services
    from srpo.reporting.table import addresses

    param("tracking/uri", uri)(project)
    assert cli.run(["track"]) == 1 and cli.run(["table"]) == 0  # MLflow is not to be had
    found = services.check_mlflow(uri).text, str(addresses(load_params(), "001"))  # what Prefect's artifact shows
    told = "".join((*capfd.readouterr(), caplog.text, *found))
    assert "127.0.0.1" in told and not [secret for secret in SECRETS if secret in told]
    assert leaks(project) == []


@pytest.mark.slow  # makes an MLflow database
def test_tokens_are_not_written(project: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    from srpo.config.loader import load_params
    from srpo.lineage.record import write_lineage
    from srpo.rounds import RoundFiles
    from srpo.stages.base import pin_base

    params = load_params()
    for name in ("base", "reward", "judge", "templates.parquet"):
        content(f"data/{name}", "a model")(project)
    pin_base(Round.of(load_params(), project, "base"))
    write_lineage(RoundFiles(project, "001").adapter, Round.of(params, project, "001"), {"001": "0" * 64})
    for argv in (["report", "001"], ["campaign"], ["table"], ["track"]):
        assert cli.run(argv) == 0
    assert (project / "mlflow.db").exists() and (project / "rounds" / "001" / "report" / "index.html").exists()
    told = "".join((*capfd.readouterr(), caplog.text))
    assert not [secret for secret in SECRETS if secret in told] and leaks(project) == []


def test_a_leak_would_be_found(project: Path) -> None:
    (project / "log.txt").write_text(f"token {TOKENS['HF_TOKEN']}")
    assert leaks(project) == [str(project / "log.txt")]


class Page(HTMLParser):
    """Tags and the names of their attributes, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_html_in_prompts_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import campaign as drawn

    hostile = [
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)",
        "</figcaption></body><iframe>", "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    ]  # fmt: skip
    monkeypatch.setattr(drawn, "PROMPTS", hostile)
    build_campaign(tmp_path, ("001",))
    param("tracking/campaign", "<script>name</script>")(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", "001"]) == 0 and cli.run(["campaign"]) == 0
    for path in (tmp_path / "rounds/001/report/index.html", tmp_path / "rounds/index.html"):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert not {"script", "iframe", "link", "object"} & page.tags
        assert not [name for name in page.attributes if name.startswith("on")]
        assert "alert(1)" in text and "{{ 7 * 7 }}" in text
