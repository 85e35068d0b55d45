"""A command's output as lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from flows import process
from flows.process import run_group


def output_of(code: str) -> list[str]:
    lines: list[str] = []
    assert run_group([sys.executable, "-c", code], lines.append) == (0, lines)
    return lines


def test_lines_of_both_streams_in_order() -> None:
    assert output_of("import sys\nprint('one')\nprint('two', file=sys.stderr)\nprint('three', end='')") == [
        "one",
        "two",
        "three",
    ]


def test_last_state_of_a_progress_bar() -> None:
    assert output_of(r"print('0 %\r 50 %\r100 %\r\ndone')") == ["100 %", "done"]


def test_long_progress_bar_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRESS_SECONDS", 0.3)
    code = "import time\nfor i in range(10): print(f'step {i}', end='\\r', flush=True); time.sleep(0.1)"
    lines = output_of(code)
    assert 2 <= len(lines) <= 5 and lines[-1] == "step 9"


def test_a_character_cut_by_a_read_stays_whole() -> None:
    code = "import os, time\nfor byte in 'prompt: مرحبا 🎈\\n'.encode(): os.write(1, bytes([byte])); time.sleep(0.002)"
    assert output_of(code) == ["prompt: مرحبا 🎈"]


def test_an_exception_ends_the_command() -> None:
    pids = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        run_group(["sh", "-c", "echo $$; sleep 60"], on_line)
    family = [process for process in psutil.process_iter() if _group(process) == pids[0]]
    assert [process for process in family if process.status() != psutil.STATUS_ZOMBIE] == []


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return 0


def test_commands_find_this_pythons_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, lines = run_group(["sh", "-c", "command -v srpo"], lambda line: None)
    assert (code, lines) == (0, [str(Path(sys.executable).parent / "srpo")])
