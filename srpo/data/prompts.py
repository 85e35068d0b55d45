"""Prompt files: JSON lines with `id`, `prompt` and optional `tags`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srpo.errors import UserError

PROMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST = 10_000  # characters; CLIP reads some 300
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # half a character, which no file can hold, and NUL


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is unique in its file and names the prompt in every dataset made from it."""

    id: str
    prompt: str
    tags: dict[str, str] = field(default_factory=dict)


def load_prompts(path: Path | str) -> list[Prompt]:
    """Read a prompt file, in file order.

    Raises:
        UserError: missing file, a line that is not such an object, a duplicate or unusable id, an empty prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; `dvc pull data.dvc` brings the embedded one") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: not a UTF-8 text file of JSON lines") from None
    except (OSError, ValueError) as error:  # no name for a file, or not to be read by this user
        raise UserError(f"{path}: no such prompt file ({getattr(error, 'strerror', None) or error})") from None
    prompts, line_of = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{path}:{number}")
        if prompt.id in line_of:
            raise UserError(
                f"{path}:{number}: id {prompt.id!r} stands on line {line_of[prompt.id]} too; make it unique"
            )
        line_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompt; add at least one line")
    return prompts


def check_disjoint(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
    """Held-out means held out: no text may stand in both files, whatever its case or spacing.

    Raises:
        UserError: naming the first shared prompt.
    """
    known = {normalize(prompt.prompt): prompt.id for prompt in train}
    for prompt in evaluation:
        if normalize(prompt.prompt) in known:
            raise UserError(
                f"prompts.eval: {prompt.id!r} has the text of train prompt {known[normalize(prompt.prompt)]!r};"
                " remove it from one of the two files"
            )


def normalize(text: str) -> str:
    """Return the text without differences of case and spacing, by which prompts are compared."""
    return " ".join(text.casefold().split())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not UNUSABLE.search(value)


def _parse(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number or brackets without end
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be a JSON object with id and prompt, found {type(row).__name__}")
    for key in ("id", "prompt"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{place}: {key} is missing or not text")
    if not PROMPT_ID.fullmatch(row["id"]):
        raise UserError(f"{place}: id {row['id']!r:.80} must be letters, digits and . _ - (64 at most)")
    if not row["prompt"].strip() or UNUSABLE.search(row["prompt"]):
        raise UserError(
            f"{place}: prompt of {row['id']!r} is empty or holds a NUL character or half a character; write a text"
        )
    if len(row["prompt"]) > LONGEST:
        raise UserError(f"{place}: prompt of {row['id']!r} has {len(row['prompt'])} characters; at most {LONGEST}")
    tags = {} if row.get("tags") is None else row["tags"]
    if not isinstance(tags, dict) or not all(_is_text(item) for pair in tags.items() for item in pair):
        raise UserError(f"{place}: tags of {row['id']!r} must map names to texts")
    if unknown := row.keys() - {"id", "prompt", "tags"}:
        raise UserError(f"{place}: unknown key {sorted(unknown)[0]!r}; a line has id, prompt and tags")
    return Prompt(row["id"], row["prompt"], tags)
