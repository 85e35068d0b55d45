"""Counter of a prompt's tokens, as the base model's text encoder counts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from srpo.config.schema import ModelParams
from srpo.errors import UserError
from srpo.models.tokenizer import load_tokenizer, num_tokens, token_limit


def token_counter(model: ModelParams, root: Path) -> tuple[Callable[[str], int], int] | None:
    """Return what counts a text's tokens, start and end included, and how many are read at once.

    None where the tokenizer is neither in the base model's folder nor in the Hub's cache.
    """
    try:
        tokenizer = load_tokenizer(model, root, local_only=True)
    except UserError:
        return None
    return partial(num_tokens, tokenizer), token_limit(tokenizer)
