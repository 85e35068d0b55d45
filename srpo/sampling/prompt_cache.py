"""Prompt embeddings, encoded once and kept by content: later rounds need no text encoder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
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

log = logging.getLogger("srpo")


def prompt_embeds(sampler: Sampler, prompts: Sequence[str], root: Path) -> PromptEmbeds:
    """The same as `sampler.encode(prompts)`, from `.srpo/cache/embeds/` when it is there.

    It is kept under the identity of the base model that stage `base` wrote down; a Hub model that is not pinned to a
    commit has none and is encoded each time. Another identity's files are removed, a damaged file is written anew.
    """
    identity = _identity(root, sampler.model.variant)
    if identity is None:
        return sampler.encode(prompts)
    cache = root / ".srpo" / "cache" / "embeds"
    for stale in cache.glob("*"):
        if stale.name != identity:
            shutil.rmtree(stale, ignore_errors=True)
    made_by = [str(sampler.unet.dtype), sampler.device.type, list(prompts)]
    file = cache / identity / f"{value_digest(made_by)[:32]}.safetensors"
    found = _read(file)
    if found is None:
        embeds = sampler.encode(prompts)
        found = {"tokens": embeds.tokens.contiguous().cpu(), "pooled": embeds.pooled.contiguous().cpu()}
        save_with_checksum(found, file)
    return sampler.as_embeds(**found)


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
