"""The base model's tokenizer, and what it cuts off; loads no weights and no torch.

`sdxl/merges.txt.gz` beside this module holds the merges of CLIP's tokenizer, published by OpenAI under the MIT license;
the vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.schema import ModelParams
from srpo.data.prompts import Prompt
from srpo.errors import user_error

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)
CONFIG = Path(__file__).parent / "sdxl"
TOKENS = 77


def load_tokenizer(model: ModelParams, root: Path) -> CLIPTokenizer:
    """Load the tokenizer of the base's text encoders, from the Hub where the base is there.

    Raises:
        UserError: it can't be loaded.
    """
    path = root / model.base
    with user_error(f"model.base: can't load {model.base!r} as an SDXL pipeline"):
        if path.is_file():
            return clip_tokenizer("<|endoftext|>")
        from transformers import CLIPTokenizer

        source = str(path) if path.exists() else model.base
        return CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", revision=model.revision)


def text_read(tokenizer: CLIPTokenizer) -> Callable[[str], str | None]:
    """Return a function that gives the tokens of a text that are read, or None for a text that is not cut."""
    limit = min(tokenizer.model_max_length, TOKENS)

    def read(text: str) -> str | None:
        tokens = tokenizer(text, truncation=True, max_length=limit + 1).input_ids
        return " ".join(map(str, tokens[: limit - 1])) if len(tokens) > limit else None

    return read


def warn_of_cut_prompts(stage: str, prompts: Sequence[Prompt], tokenizer: CLIPTokenizer) -> None:
    """Log once how many of these prompts the text encoders do not read to their end."""
    read = text_read(tokenizer)
    cut = [prompt.id for prompt in prompts if read(prompt.prompt) is not None]
    if cut:
        limit = min(tokenizer.model_max_length, TOKENS)
        log.warning(
            "%s: %d of %d prompts are longer than the %d tokens that the text encoders read, such as %s; the rest of"
            " them is cut off",
            stage, len(cut), len(prompts), limit, cut[0],
        )  # fmt: skip


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Return CLIP's tokenizer, which cuts at 77 tokens."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress((CONFIG / "merges.txt.gz").read_bytes()).decode()
    letters = _byte_letters()
    words = ["".join(line.split()) for line in merges.splitlines()[1:]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "merges.txt").write_text(merges, encoding="utf-8")
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=pad_token)


def _byte_letters() -> list[str]:
    """Return the printable letters that stand for the 256 bytes in byte-level BPE, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
