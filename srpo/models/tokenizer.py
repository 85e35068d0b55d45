"""The base model's tokenizer, and what it cuts off; loads no weights and no torch.

`sdxl/merges.txt.gz` beside this module holds the merges of CLIP's tokenizer, published by OpenAI under the MIT license;
the vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.schema import ModelParams
from srpo.errors import user_error
from srpo.rounds import Round

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)
CONFIG = Path(__file__).parent / "sdxl"
TOKENS = 77
NUM_SPECIAL_TOKENS = 2


def load_tokenizer(model: ModelParams, root: Path, *, local_only: bool = False) -> CLIPTokenizer:
    """Load the tokenizer of the base's text encoders, from the Hub where the base is there.

    Args:
        local_only: look for it in folders and in the Hub's cache only.

    Raises:
        UserError: it can't be loaded.
    """
    path = root / model.base
    with user_error(f"model.base: can't load {model.base!r} as an SDXL pipeline"):
        if path.is_file():
            return clip_tokenizer("<|endoftext|>")
        from transformers import CLIPTokenizer

        source = str(path) if path.exists() else model.base
        options = {"revision": model.revision, "local_files_only": local_only}
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options)
        if len(tokenizer) <= NUM_SPECIAL_TOKENS:  # transformers makes one without words where it finds no files
            raise ValueError("it has no tokenizer")
        return tokenizer


def num_tokens(tokenizer: CLIPTokenizer, text: str) -> int:
    """Return the number of a text's tokens, with start and end."""
    return len(tokenizer(text, verbose=False).input_ids)


def token_limit(tokenizer: CLIPTokenizer) -> int:
    """Return how many tokens the text encoders read at once, with start and end."""
    return min(tokenizer.model_max_length, TOKENS)


def text_read(model: ModelParams, tokenizer: CLIPTokenizer) -> Callable[[str], str | None]:
    """Return a function that gives the tokens of a text that are read, or None for a text that is not cut."""
    limit = token_limit(tokenizer)

    def read(text: str) -> str | None:
        tokens = tokenizer(text, truncation=True, max_length=limit + 1).input_ids
        return " ".join(map(str, tokens[: limit - 1])) if len(tokens) > limit else None

    return read if model.long_prompts == "cut" else lambda text: None


def warn_of_cut_prompts(stage: str, prompts: Iterable[tuple[str, str]], round: Round, tokenizer: CLIPTokenizer) -> None:
    """Log once how many of these prompts the text encoders do not read to their end.

    Args:
        prompts: name and text of each.
    """
    read = text_read(round.params.model, tokenizer)
    names = [(name, read(text) is not None) for name, text in prompts]
    cut = [name for name, is_cut in names if is_cut]
    if cut:
        log.warning(
            "%s %s: %d of %d prompts are longer than the %d tokens that the text encoders read, such as %s; the rest of"
            " them is cut off (model.long_prompts: chunk reads them to the end)",
            *(stage, round.key, len(cut), len(names), token_limit(tokenizer), cut[0]),
        )


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
