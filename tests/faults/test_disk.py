"""A disk that is full or read-only: one line, status 1, nothing lost; with room again the same bytes."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from srpo.errors import BlockedError, environment_error_message
from tests.faults.helpers import OUTPUTS, command_of, contents, oddities, run, take_away

STAGES = ("generate", "score", "select", "train", "evaluate", "gate", "report")


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def test_full_disk(project: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64m", "none", at=place):
        root = place / "project"
        shutil.copytree(project, root)
        for stage in STAGES:
            undisturbed = {name: contents(root, name) for name in OUTPUTS}
            take_away(root, stage)
            filler = fill(place)
            done = run_without_log(root, stage, tmp_path)
            assert done[0] == 1, done
            assert "srpo: error: " in done[1] and "no space left on device" in done[1], done[1]
            assert "Traceback" not in done[1]
            assert not oddities(root)
            for name in set(OUTPUTS) - {stage}:
                assert contents(root, name) == undisturbed[name], f"{stage} harmed the outputs of {name}"
            filler.unlink()
            code, told = run(root, *command_of(stage))
            assert code == 0, told
            assert contents(root, stage) == undisturbed[stage]
            if stage == "evaluate":  # it removes the verdict on what was there before
                assert run(root, *command_of("gate"))[0] == 0


def run_without_log(root: Path, stage: str, logs: Path) -> tuple[int, str]:
    from tests.faults.helpers import start

    process = start(root, *command_of(stage), log=logs / "log")
    process.join()
    return process.exitcode, (logs / "log").read_text()


def test_read_only_rounds(project: Path) -> None:
    before = contents(project, "select")
    rounds = project / "rounds"
    with mounted("--bind", str(rounds), at=rounds):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(rounds)], check=True)
        code, told = run(project, "select", "001")
        assert code == 1 and "rounds/001: not writable" in told and "Traceback" not in told
    assert contents(project, "select") == before
    assert run(project, "select", "001")[0] == 0
    assert contents(project, "select") == before


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x", "/data/file"), "/data/file: no space left on device; free disk space"),
        (OSError(errno.EFBIG, "x"), "file too large; raise the limit"),
        (OSError("[Errno 28] Error writing bytes to file"), "no space left on device"),
        (ValueError("I/O error: No space left on device (os error 28)"), "no space left on device"),
        (OSError(errno.EXDEV, "x"), "invalid cross-device link; move rounds/ and .srpo/ to one file system"),
        (BlockedError("by that"), "by that"),
    ],
)
def test_environment_errors_are_one_line(error: Exception, told: str) -> None:
    assert environment_error_message(error).startswith(told)
    wrapped = RuntimeError("in the writer")
    wrapped.__cause__ = error
    assert environment_error_message(wrapped).startswith(told)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), ValueError("errno"), KeyError("os error 2")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert environment_error_message(error) is None


def test_file_size_limit(tmp_path: Path) -> None:
    from srpo.storage.json_files import write_json

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_json(tmp_path / "x.json", "far more than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "file too large" in environment_error_message(caught.value)
    assert not (tmp_path / "x.json").exists()
