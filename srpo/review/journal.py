"""Journals of human decisions: append-only files of JSON lines under `review/<round>/`.

`rounds/` can be made again and Git ignores it; human decisions can't, so they are kept apart, as text that Git tracks.
Every session of every rater has a file of its own, so two servers never write to the same one. A decision is on the
disk before it is confirmed. A line without its end is that of a server killed while it wrote, and is not read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import threading
import unicodedata
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srpo.errors import UserError

FOLDER = "review"
RATER = re.compile(r"[\w-][\w.-]{0,31}")
Decision = dict[str, Any]
"""One line of a journal: `id`, `rater`, `at` and either `item` with what was decided or `undo`, the id of another."""


class Journal:
    """The decisions of one kind, `picks` or `votes`, about one round.

    Decisions that other servers write are seen as soon as they are on the disk.
    """

    def __init__(self, root: Path, key: str, kind: str) -> None:
        self.folder = root / FOLDER / key / kind
        self._session = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self._read: dict[Path, int] = {}
        self._decisions: dict[str, Decision] = {}
        self._lock = threading.Lock()

    def append(self, rater: str, decision: Decision) -> None:
        """Write a decision of this rater; one whose `id` is known is a repeated request and is left out.

        Raises:
            OSError: it could not be written, and nothing was.
        """
        with self._lock:
            self._refresh()
            if decision["id"] in self._decisions:
                return
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"rater": rater, "at": now} | decision, ensure_ascii=False) + "\n"
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{rater}-{self._session}.jsonl").open("ab", buffering=0) as file:
                start, data = file.seek(0, os.SEEK_END), line.encode()
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        file.truncate(start)
                    raise

    def decisions(self, rater: str | None = None) -> list[Decision]:
        """Return what stands, oldest first: the last decision of each rater about each item, without those undone.

        Raises:
            UserError: a file of the journal is damaged.
        """
        with self._lock:
            self._refresh()
            found = sorted(self._decisions.values(), key=lambda decision: decision["at"])
        undone = {decision["undo"] for decision in found if "undo" in decision}
        standing: dict[tuple[str, str], Decision] = {}
        for decision in found:
            if "undo" not in decision and decision["id"] not in undone and rater in (None, decision["rater"]):
                place = decision["rater"], decision["item"]
                standing.pop(place, None)
                standing[place] = decision
        return list(standing.values())

    def _refresh(self) -> None:
        """Read the lines that files have gained."""
        for path in sorted(self.folder.glob("*.jsonl")):
            done = self._read.get(path, 0)
            if path.stat().st_size == done:
                continue
            with path.open("rb") as file:
                file.seek(done)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                try:
                    decision = json.loads(line)
                    self._decisions[decision["id"]] = {"at": decision["at"], "rater": decision["rater"]} | decision
                    if "undo" not in decision:
                        decision["item"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}: damaged near byte {done}; `git checkout` restores it") from None
            self._read[path] = done + len(whole)


def check_rater(name: str) -> str:
    """Return a rater's name in one spelling.

    Raises:
        UserError: it can't be part of a file name.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if not RATER.fullmatch(name):
        raise UserError("a rater's name is 1 to 32 letters, digits and . _ -")
    return name
