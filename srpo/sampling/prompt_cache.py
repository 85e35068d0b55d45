"""A cache of prompt embeddings by content, so that later rounds need no text encoder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srpo.lineage.identity import COMMIT
from srpo.lineage.record import read_lineage
from srpo.rounds import BASE, RoundFiles
from srpo.sampling.conditioning import PromptEmbeds
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.hashing import value_digest

if TYPE_CHECKING:
    from srpo.sampling.sampler import Sampler

log = logging.getLogger(__name__)


def prompt_embeds(
    sampler: Sampler, prompts: Sequence[str], root: Path, negatives: Sequence[str | None] = ()
) -> PromptEmbeds:
    """Return the conditioning of n prompts, and of the empty prompt as the last row.

    Args:
        negatives: the negative prompt of each prompt; None, or an empty sequence, is the empty prompt.
    """
    distinct = list(dict.fromkeys(text for text in negatives if text is not None))
    rows = {text: len(prompts) + number for number, text in enumerate(distinct)}
    embeds = _encode(sampler, [*prompts, *distinct], root)
    return replace(embeds, negatives=tuple(-1 if text is None else rows[text] for text in negatives))


def _encode(sampler: Sampler, texts: list[str], root: Path) -> PromptEmbeds:
    """Return `sampler.encode(texts)`, from `.srpo/cache/embeds/` when it is there.

    The cache key holds the identity of the base model that stage `base` recorded; a Hub model that is not pinned to a
    commit has no identity and is encoded each time. Files of another identity are removed, damaged ones replaced.
    """
    identity = _identity(root, sampler.model.variant)
    if identity is None:
        return sampler.encode(texts)
    cache = root / ".srpo" / "cache" / "embeds"
    for stale in cache.glob("*"):
        if stale.name != identity:
            shutil.rmtree(stale, ignore_errors=True)
    inputs = [str(sampler.unet.dtype), sampler.device.type, texts]
    file = cache / identity / f"{value_digest(inputs)[:32]}.safetensors"
    tensors = _read(file)
    if tensors is None:
        embeds = sampler.encode(texts)
        tensors = {"tokens": embeds.tokens.contiguous().cpu(), "pooled": embeds.pooled.contiguous().cpu()}
        save_with_checksum(tensors, file)
    return sampler.as_embeds(**tensors)


def _identity(root: Path, variant: str | None) -> str | None:
    base = read_lineage(RoundFiles(root, BASE)).get("base") or {}
    revision = base.get("revision")
    pinned = base.get("digest") or (revision if revision and COMMIT.fullmatch(revision) else None)
    return value_digest([base["source"], pinned, variant])[:16] if pinned else None


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    if not file.exists():
        return None
    try:
        return load_with_checksum(file)
    except (OSError, ValueError):
        log.warning("%s: damaged; encoding its prompts anew", file.name)
        return None
