"""`srpo review` as a command: bad input is one line, and the token is the user's own.

python -m pytest tests/review/test_server.py
"""

from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from srpo.cli import run
from srpo.review.security import project_token
from tests.support.servers import kill


def test_the_port_may_be_taken(campaign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["review", "001", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"srpo: error: port {port}: taken; name another with --port\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["009"], "no such round"), (["base"], "no such round"), (["002"], "no parquet file there")],
)
def test_a_round_must_have_candidates(campaign: Path, capsys, arguments: list[str], words: str) -> None:
    shutil.rmtree(campaign / "rounds/002/candidates")
    assert run(["review", *arguments, "--port", "0"]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_without_an_evaluation_one_can_still_pick(campaign: Path, open_review) -> None:
    shutil.rmtree(campaign / "rounds/001/evaluation")
    client = open_review()
    assert client.get("/pick", params={"rater": "anna"}).status_code == 200
    assert "no parquet file there" in client.get("/compare", params={"rater": "anna"}).text


def test_the_token_stays_and_is_private(tmp_path: Path) -> None:
    token = project_token(tmp_path)
    file = tmp_path / ".srpo/review-token"
    assert len(token) >= 32 and project_token(tmp_path) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("")  # as a process killed between making and writing it leaves it
    assert len(project_token(tmp_path)) >= 32 and project_token(tmp_path) != token


def test_the_server_is_on_loopback_and_has_no_torch(campaign: Path) -> None:
    code = "import sys; from srpo.cli import run; sys.stdout.reconfigure(line_buffering=True);"
    code += (
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); run(['review', '001', '--port', '0'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        answer = httpx.get(address, trust_env=False, timeout=60)
        assert answer.status_code == 303 and TOKEN_COOKIE in answer.headers["set-cookie"]
        process.stdout.readline()
        process.send_signal(2)
        assert process.stdout.readline().strip() == "False" and process.wait(30) == 0
    finally:
        kill(process)


TOKEN_COOKIE = "srpo-review-"
