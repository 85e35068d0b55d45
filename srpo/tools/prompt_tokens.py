"""Counter of a prompt's tokens, as the base model's text encoder counts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from srpo.config.schema import ModelParams

CLIP_TOKENS = 77


def token_counter(model: ModelParams, root: Path) -> tuple[Callable[[str], int], int] | None:
    """Return what counts a text's tokens, start and end included, and how many are read.

    None where the tokenizer is neither in the base model's folder nor in the Hub's cache.
    """
    from transformers import CLIPTokenizer

    local = root / model.base
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            str(local) if local.is_dir() else model.base,
            subfolder="tokenizer",
            revision=model.revision,
            local_files_only=True,
        )
    except (OSError, ValueError):
        return None
    limit = min(tokenizer.model_max_length, CLIP_TOKENS)
    tokenizer.model_max_length = 1 << 30  # else it warns of every long prompt
    return lambda text: len(tokenizer(text).input_ids), limit
