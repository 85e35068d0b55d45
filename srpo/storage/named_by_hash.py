"""Files of JSON lines whose name holds the hash of their content, `<stem>-<16 hex digits>.jsonl`.

A DVC stage can't depend on a file that may not be there, but it depends on its params. A param that names the file by
its content makes exactly the stages rerun that read this param when another file is named.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from srpo.errors import UserError
from srpo.storage.files import atomic_write

NAME = re.compile(r"([a-z]+)-([0-9a-f]{16})\.jsonl")


def write_rows(folder: Path, stem: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write these rows atomically, one JSON object a line, and return the file's path."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = folder / f"{stem}-{_digest(data)}.jsonl"
    with atomic_write(path) as partial:
        partial.write_bytes(data)
    return path


def read_rows(path: Path, stem: str, param: str, command: str) -> list[dict[str, Any]]:
    """Read the rows of a file.

    Args:
        path: of the file.
        stem: that its name must have.
        param: the key of params.yaml that names the file, for messages.
        command: the command that writes such a file, for messages.

    Raises:
        UserError: no such file, or not the content that its name says.
    """
    name = NAME.fullmatch(path.name)
    if not name or name[1] != stem:
        raise UserError(f"{param}: {path.name}: not a file of {stem}; `{command}` writes {stem}-<hash>.jsonl")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{param}: {path}: {error.strerror}; restore it with Git, or run `{command}`") from None
    if _digest(data) != name[2]:
        raise UserError(f"{path}: changed since it was written; restore it with Git, or run `{command}`")
    return [json.loads(line) for line in data.decode().splitlines()]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
