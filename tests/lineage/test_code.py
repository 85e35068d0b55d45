"""The digest of the modules that compute something: other code counts, comments and other packages do not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from srpo.lineage import code

MODULE = "srpo.stages.train"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(code, "PACKAGE", Path(shutil.copytree(code.PACKAGE, tmp_path / "srpo")))
    code._parse.cache_clear()
    yield tmp_path / "srpo"
    code._parse.cache_clear()


def edited(file: Path, old: str, new: str) -> str:
    """Return the digest after an edit of the file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    code._parse.cache_clear()
    return code.import_closure_digest(MODULE)


def test_only_code_that_is_imported_counts(package: Path) -> None:
    before = code.import_closure_digest(MODULE)
    whole = code.code_digest()
    assert edited(package / "reporting" / "charts.py", "import", "import  ") == before
    assert edited(package / "training" / "noise_schedule.py", "Return min-SNR", "Give min-SNR") == before
    assert code.code_digest() != whole, "the digest of the whole package covers every file"
    changed = edited(package / "training" / "losses.py", "(positive + negative) / 2", "(positive + negative) / 3")
    assert changed != before
    assert edited(package / "sampling" / "conditioning.py", "row %= len(self)", "row = row % len(self)") != changed
