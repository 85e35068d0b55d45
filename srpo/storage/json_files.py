"""JSON files: written whole, read with errors of one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.errors import MissingFile, UserError, one_line


def write_json(path: Path, value: object) -> None:
    """Write JSON that reads well in a diff, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file of this project's own.

    Raises:
        UserError: the file is damaged; a `MissingFile` where it is not there.
    """
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in reading this file of a round is one line that names it.

    Raises:
        UserError: the file is damaged; a `MissingFile` where it is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{path}: missing; run the stage that makes it, or `dvc checkout`") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error):.120}); `dvc checkout` restores it") from None
