"""Prompt files: JSON lines with `id`, `prompt` and optional `tags`, `negative_prompt`, `width` and `height`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srpo.errors import UserError

PROMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST = 10_000  # characters; CLIP reads about 300
SIDES = range(8, 4097, 8)  # pixels
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and surrogates, which UTF-8 can't encode


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is unique in its file and names the prompt in every dataset made from it."""

    id: str
    prompt: str
    tags: dict[str, str] = field(default_factory=dict)
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None


def load_prompts(path: Path | str) -> list[Prompt]:
    """Read a prompt file, in file order.

    Raises:
        UserError: the file is missing, a line is not such an object, an id is unusable or not unique, or a prompt is
            empty.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; `dvc pull data.dvc` downloads the project's own") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: not a UTF-8 text file of JSON lines") from None
    except (OSError, ValueError) as error:  # not a possible file name, or not readable by this user
        raise UserError(f"{path}: no such prompt file ({getattr(error, 'strerror', None) or error})") from None
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{path}:{number}")
        if prompt.id in line_of:
            raise UserError(f"{path}:{number}: id {prompt.id!r} is also on line {line_of[prompt.id]}; make it unique")
        line_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: has no prompts; add at least one line")
    return prompts


def negative_prompts(prompts: Sequence[Prompt], default: str | None) -> list[str | None]:
    """Return each prompt's own negative prompt, else the default; None is the base model's empty prompt."""
    return [default if prompt.negative_prompt is None else prompt.negative_prompt for prompt in prompts]


def named_texts(prompts: Sequence[Prompt], negative_prompt: str | None) -> list[tuple[str, str]]:
    """Return every text that the text encoders read, with the prompt's id: prompts and negative prompts."""
    negatives = [(f"{prompt.id}'s negative_prompt", prompt.negative_prompt) for prompt in prompts]
    texts = [*((prompt.id, prompt.prompt) for prompt in prompts), *negatives, ("negative_prompt", negative_prompt)]
    return [(name, text) for name, text in texts if text]


def check_disjoint(
    train: Sequence[Prompt],
    evaluation: Sequence[Prompt],
    text_read: Callable[[str], str | None] = lambda text: None,
) -> None:
    """Check that no prompt is in both files, ignoring case and spacing: evaluation prompts are held out.

    Args:
        text_read: gives the part of a text that the model reads, in any form; None for a text that it reads to its end.

    Raises:
        UserError: naming the first shared prompt.
    """

    def key(text: str) -> tuple[str, bool]:
        part = text_read(text)
        return (normalize(text), False) if part is None else (part, True)

    known = {key(prompt.prompt): prompt.id for prompt in train}
    for prompt in evaluation:
        shared = key(prompt.prompt)
        if shared in known:
            cut = ", equal in all tokens that the text encoders read" if shared[1] else ""
            raise UserError(
                f"prompts.eval: {prompt.id!r} has the text of train prompt {known[shared]!r}{cut};"
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
    except (ValueError, RecursionError) as error:  # an endless number, or too many brackets
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
            f"{place}: prompt of {row['id']!r} is empty, or has a NUL character or a lone surrogate; write valid text"
        )
    if len(row["prompt"]) > LONGEST:
        raise UserError(f"{place}: prompt of {row['id']!r} has {len(row['prompt'])} characters; at most {LONGEST}")
    tags = {} if row.get("tags") is None else row["tags"]
    if not isinstance(tags, dict) or not all(_is_text(item) for pair in tags.items() for item in pair):
        raise UserError(f"{place}: tags of {row['id']!r} must map names to texts")
    negative = row.get("negative_prompt")
    if negative is not None and (not _is_text(negative) or len(negative) > LONGEST):
        raise UserError(f"{place}: negative_prompt of {row['id']!r} must be a text of at most {LONGEST} characters")
    size = [row.get("width"), row.get("height")]
    if size != [None, None] and not all(type(side) is int and side in SIDES for side in size):
        raise UserError(f"{place}: width and height of {row['id']!r} must both be multiples of 8, from 8 to 4096")
    if unknown := row.keys() - {"id", "prompt", "tags", "negative_prompt", "width", "height"}:
        raise UserError(
            f"{place}: unknown key {sorted(unknown)[0]!r}; a line has id, prompt, tags, negative_prompt, width and"
            " height"
        )
    return Prompt(row["id"], row["prompt"], tags, negative, *size)
