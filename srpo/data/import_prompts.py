"""Import of prompts: from any source to the two prompt files, cleaned, without repeats, some held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from srpo.data.near_repeats import find_near_repeats, fold
from srpo.data.prompt_cleaning import clean_prompt
from srpo.data.prompt_sources import Row, read_source
from srpo.data.prompts import LONGEST, Prompt
from srpo.errors import UserError
from srpo.storage.files import atomic_write
from srpo.storage.hashing import derive_seed
from srpo.storage.json_files import write_json

SUMMARY_FILE = "import.json"
LEAST_EVAL = 3  # an interval needs them
SHOWN = 8


@dataclass
class Summary:
    """The counts of one import; `import.json` has the same."""

    sources: list[str]
    seed: int
    read: int = 0
    empty: int = 0
    too_long: int = 0
    exact_repeats: int = 0
    near_repeats: int = 0
    train: int = 0
    eval: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] | None = None

    def lines(self) -> list[str]:
        """Return the counts as lines to print."""
        unusable = f", {self.empty} empty" * bool(self.empty)
        unusable += f", {self.too_long} longer than {LONGEST} characters" * bool(self.too_long)
        lines = [
            f"read     {self.read} prompts of {', '.join(self.sources)}{unusable}",
            f"dropped  {self.exact_repeats} exact and {self.near_repeats} near repeats",
            f"wrote    {self.train} train and {self.eval} eval prompts; no eval prompt nearly repeats a train prompt",
        ]
        if self.removed:
            lines.append(f"removed  {_most_frequent(self.removed)}")
        if self.left:
            lines.append(f"left     {_most_frequent(self.left)}: other tools read these, SDXL reads them as text")
        if self.tokens is None:
            lines.append("tokens   not counted: the base model's tokenizer is not here yet")
        else:
            lines.append("tokens   {too_long} prompts have more than {limit}; the most is {most}".format(**self.tokens))
        return lines


def import_prompts(
    sources: Sequence[str],
    train: Path,
    held_out: Path,
    *,
    column: str = "prompt",
    tags: Sequence[str] = (),
    split: str = "train",
    eval_count: int = 500,
    seed: int = 0,
    overwrite: bool = False,
    count_tokens: tuple[Callable[[str], int], int] | None = None,
) -> Summary:
    """Write the two prompt files and, beside the first, `import.json` with the counts.

    A prompt's id is made of its cleaned text, so it stays the same over imports. The first of several repeats stays.
    Which prompts are held out depends on their ids and the seed, so more sources move few of them.

    Args:
        column, tags, split: as `read_source` has them.
        eval_count: prompts to hold out.
        overwrite: replace files that exist.
        count_tokens: counts a prompt's tokens; and the limit.

    Raises:
        UserError: a bad source, files that exist, or too few prompts.
    """
    for path in (train, held_out):
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; --force replaces it")
    if train.absolute() == held_out.absolute():
        raise UserError(f"{train}: prompts.train and prompts.eval are the same file; name two")
    if eval_count < LEAST_EVAL:
        raise UserError(f"--eval {eval_count}: hold out at least {LEAST_EVAL} prompts, better 500")
    summary = Summary(list(sources), seed)
    rows = (row for source in sources for row in read_source(source, column, tags, split))
    prompts = _without_repeats(_clean(rows, summary), summary)
    if len(prompts) <= eval_count:
        raise UserError(
            f"--eval {eval_count}: only {len(prompts)} prompts are left of {summary.read} read"
            f" ({summary.exact_repeats + summary.near_repeats} repeats); hold out fewer or add sources"
        )
    drawn = sorted(prompts, key=lambda prompt: derive_seed(seed, "eval", prompt.id))[:eval_count]
    chosen = {prompt.id for prompt in drawn}
    parts = [[p for p in prompts if p.id not in chosen], [p for p in prompts if p.id in chosen]]
    summary.train, summary.eval = len(parts[0]), len(parts[1])
    if count_tokens:
        count, limit = count_tokens
        counts = [count(prompt.prompt) for prompt in prompts]
        summary.tokens = {"limit": limit, "most": max(counts), "too_long": sum(n > limit for n in counts)}
    for path, part in zip((train, held_out), parts, strict=True):
        _write(path, part)
    write_json(train.with_name(SUMMARY_FILE), asdict(summary))
    return summary


def _clean(rows: Iterable[Row], summary: Summary) -> list[Prompt]:
    removed: Counter[str] = Counter()
    left: Counter[str] = Counter()
    prompts = []
    for text, tags in rows:
        summary.read += 1
        if len(text) > LONGEST:
            summary.too_long += 1
            continue
        cleaned = clean_prompt(text)
        removed += cleaned.removed
        left += cleaned.left
        if fold(cleaned.text):
            tags = {clean_prompt(name).text: clean_prompt(value).text for name, value in tags.items()}
            prompts.append(Prompt(_id(cleaned.text), cleaned.text, tags))
        else:
            summary.empty += 1
    summary.removed, summary.left = dict(removed.most_common()), dict(left.most_common())
    return prompts


def _without_repeats(prompts: Sequence[Prompt], summary: Summary) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(fold(prompt.prompt), prompt)
    distinct = list(first.values())
    originals = find_near_repeats([prompt.prompt for prompt in distinct])
    kept = [prompt for prompt, original in zip(distinct, originals, strict=True) if original is None]
    summary.exact_repeats = len(prompts) - len(distinct)
    summary.near_repeats = len(distinct) - len(kept)
    return kept


def _id(text: str) -> str:
    return f"p{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write(path: Path, prompts: Sequence[Prompt]) -> None:
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            row = {"id": prompt.id, "prompt": prompt.prompt} | ({"tags": prompt.tags} if prompt.tags else {})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _most_frequent(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")
