"""Journals: what stands, two writers, killed writers, full disks.

python -m pytest tests/review/test_journal.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from srpo.errors import UserError
from srpo.review.journal import Journal, check_rater


def journal(root: Path) -> Journal:
    return Journal(root, "001", "picks")


def test_the_last_decision_stands_unless_undone(tmp_path: Path) -> None:
    one, other = journal(tmp_path), journal(tmp_path)
    one.append("anna", {"id": "a1", "item": "x", "picked": "x-1"})
    other.append("anna", {"id": "a2", "item": "x", "picked": "x-2"})
    one.append("ben", {"id": "b1", "item": "x", "picked": "x-3"})
    one.append("anna", {"id": "a3", "item": "y", "picked": None})
    one.append("anna", {"id": "a4", "undo": "a3"})
    for each in (one, other, journal(tmp_path)):
        assert [(row["rater"], row["picked"]) for row in each.decisions()] == [("anna", "x-2"), ("ben", "x-3")]
        assert [row["picked"] for row in each.decisions("anna")] == ["x-2"]
    one.append("anna", {"id": "a5", "undo": "a2"})
    assert [row["picked"] for row in other.decisions("anna")] == ["x-1"]


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    shared = journal(tmp_path)

    def write(name: str, own: Journal) -> None:
        for i in range(25):
            own.append(name, {"id": f"{name}-{i}", "item": f"p{i}", "picked": None})

    threads = [threading.Thread(target=write, args=(name, shared)) for name in ("anna", "ben")]
    threads += [threading.Thread(target=write, args=("anna-b", journal(tmp_path)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal(tmp_path).decisions()) == len(shared.decisions()) == 75
    assert len(list((tmp_path / "review/001/picks").iterdir())) == 3


def test_a_killed_writer_leaves_whole_decisions(tmp_path: Path) -> None:
    code = """
import sys, itertools
from pathlib import Path
from srpo.review.journal import Journal
own = Journal(Path(sys.argv[1]), "001", "picks")
for i in itertools.count():
    own.append("anna", {"id": f"d{i}", "item": f"p{i}", "picked": None, "prompt": "x" * 5000})
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    confirmed = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    confirmed += [int(line) for line in process.stdout]
    process.wait()
    found = {row["item"] for row in journal(tmp_path).decisions()}
    assert {f"p{i}" for i in confirmed} <= found and len(found) <= len(confirmed) + 1


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.append("anna", {"id": "d1", "item": "x", "picked": None})
    (file,) = (tmp_path / "review/001/picks").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "d2", "ite')
    again = journal(tmp_path)
    assert len(again.decisions()) == 1
    again.append("anna", {"id": "d3", "item": "y", "picked": None})  # to a file of its own
    assert len(journal(tmp_path).decisions()) == 2
    file.write_bytes(whole + b'{"id": "d2"}\n')
    with pytest.raises(UserError, match=r"damaged near byte .*git checkout"):
        journal(tmp_path).decisions()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from srpo.review.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
own = Journal(Path(sys.argv[1]), "001", "picks")
own.append("anna", {"id": "d1", "item": "x", "picked": None})
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
try:
    own.append("anna", {"id": "d2", "item": "y", "picked": None, "prompt": "x" * 5000})
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
own.append("anna", {"id": "d3", "item": "z", "picked": None})
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() in ("27", "28")
    assert [row["item"] for row in journal(tmp_path).decisions()] == ["x", "z"]


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a b", "x" * 33, "<b>"])
def test_a_name_must_fit_a_file_name(name: str) -> None:
    with pytest.raises(UserError, match="1 to 32 letters"):
        check_rater(name)


def test_names_of_any_alphabet_have_one_spelling() -> None:
    assert check_rater("Zoe\u0308") == check_rater("Zo\u00eb") == "Zo\u00eb"
    assert check_rater("\u0627\u0644\u0644\u0647") and check_rater("b.smith-2")
