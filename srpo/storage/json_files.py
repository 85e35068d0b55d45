"""JSON files: atomic writes, and one-line errors on reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.errors import MissingFile, UserError, one_line
from srpo.storage.files import atomic_write


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of this project whose content is an object.

    Raises:
        UserError: the file is damaged; `MissingFile` if there is no such file.
    """
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading this file of a round into one line that names it.

    Raises:
        UserError: the file is damaged; `MissingFile` if there is no such file.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{path}: missing; run the stage that makes it, or `dvc checkout`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error):.120}); `dvc checkout` restores it") from None
