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
from srpo.sampling.conditioning import Conditioning, PromptEmbeds, stacked
from srpo.storage.checksummed import load_with_checksum, save_with_checksum
from srpo.storage.hashing import value_digest

if TYPE_CHECKING:
    from srpo.sampling.sampler import Sampler

log = logging.getLogger(__name__)

PROMPTS_PER_FILE = 1024  # of training: 320 MB in 16 bits


def prompt_embeds(
    sampler: Sampler, prompts: Sequence[str], root: Path, negatives: Sequence[str | None] = ()
) -> PromptEmbeds:
    """Return the conditioning of n prompts, and of the empty prompt as the last row.

    Args:
        negatives: the negative prompt of each prompt; None, or an empty sequence, is the empty prompt.
    """
    texts = _texts(prompts, negatives)
    rows = {text: row for row, text in enumerate(texts) if row >= len(prompts)}
    embeds = _stored(sampler, texts, root).to(sampler.device)
    return replace(embeds, negatives=tuple(-1 if text is None else rows[text] for text in negatives))


def encode_ahead(sampler: Sampler, groups: Sequence[tuple[Sequence[str], Sequence[str | None]]], root: Path) -> None:
    """Encode the prompts and negative prompts of groups that the cache lacks, then free the text encoders' memory.

    Does nothing for a base without identity, whose embeddings are not kept in files.
    """
    if _identity(root, sampler.model.variant):
        for prompts, negatives in groups:
            if not _file(sampler, _texts(prompts, negatives), root).exists():
                prompt_embeds(sampler, prompts, root, negatives)
        sampler.release_text_encoders()


class StoredEmbeds:
    """Conditioning of n prompts and, as row n, of the empty prompt, in memory-mapped files of the cache.

    Memory does not grow with the prompts, except for a base without identity, whose embeddings are not kept in files.
    """

    def __init__(self, sampler: Sampler, prompts: Sequence[str], root: Path) -> None:
        """Encode the prompts that the cache lacks, PROMPTS_PER_FILE at a time."""
        self._device = sampler.device
        self._num_prompts = len(prompts)
        self._parts = [
            _stored(sampler, prompts[start : start + PROMPTS_PER_FILE], root)
            for start in range(0, len(prompts) or 1, PROMPTS_PER_FILE)
        ]

    def __len__(self) -> int:
        return self._num_prompts + 1

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """Return the conditioning of these rows on the sampler's device."""
        places = [self._place(row) for row in rows]
        pooled = torch.stack([part.pooled[row] for part, row in places])
        found = stacked((part.text(row) for part, row in places), pooled)
        return Conditioning(*(tensor.to(self._device) for tensor in found))

    def num_chunks(self, row: int) -> int:
        """Return the number of a prompt's chunks."""
        part, row = self._place(row)
        return part.num_chunks(row)

    def _place(self, row: int) -> tuple[PromptEmbeds, int]:
        if row == self._num_prompts:
            return self._parts[-1], -1
        part, row = divmod(row, PROMPTS_PER_FILE)
        return self._parts[part], row


def _texts(prompts: Sequence[str], negatives: Sequence[str | None]) -> list[str]:
    """Return the prompts, and the distinct negative prompts after them."""
    return [*prompts, *dict.fromkeys(text for text in negatives if text is not None)]


def _stored(sampler: Sampler, prompts: Sequence[str], root: Path) -> PromptEmbeds:
    """Return `sampler.encode(prompts)` on the CPU, memory-mapped from `.srpo/cache/embeds/`.

    The cache key holds the identity of the base model that stage `base` recorded; a Hub model that is not pinned to a
    commit has no identity and is encoded each time. Files of another identity are removed, damaged ones replaced.
    """
    identity = _identity(root, sampler.model.variant)
    if identity is None:
        return _loaded(_encoded(sampler, prompts))
    file = _file(sampler, prompts, root)
    cache = file.parent.parent
    for stale in cache.glob("*"):
        if stale.name != identity:
            shutil.rmtree(stale, ignore_errors=True)
    tensors = _read(file)
    if tensors is None:
        save_with_checksum(_encoded(sampler, prompts), file)
        tensors = load_with_checksum(file)
    return _loaded(tensors)


def _file(sampler: Sampler, prompts: Sequence[str], root: Path) -> Path:
    identity = _identity(root, sampler.model.variant)
    assert identity
    inputs = [str(sampler.dtype), sampler.device.type, sampler.model.long_prompts, list(prompts)]
    if sampler.text_lora:
        inputs.append(sampler.text_lora)
    return root / ".srpo" / "cache" / "embeds" / identity / f"{value_digest(inputs)[:32]}.safetensors"


def _encoded(sampler: Sampler, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    embeds = sampler.encode(prompts)
    chunks = torch.tensor(embeds.chunks, dtype=torch.int64)
    tensors = {"tokens": embeds.tokens, "pooled": embeds.pooled, "chunks": chunks}
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _loaded(tensors: dict[str, torch.Tensor]) -> PromptEmbeds:
    return PromptEmbeds(tensors["tokens"], tensors["pooled"], tuple(tensors["chunks"].tolist()))


def _identity(root: Path, variant: str | None) -> str | None:
    base = read_lineage(RoundFiles(root, BASE)).get("base") or {}
    revision = base.get("revision")
    pinned = base.get("digest") or (revision if revision and COMMIT.fullmatch(revision) else None)
    return value_digest([base["source"], pinned, variant, *base.get("loras", ())])[:16] if pinned else None


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    if not file.exists():
        return None
    try:
        return load_with_checksum(file)
    except (OSError, ValueError):
        log.warning("%s: damaged; encoding its prompts anew", file.name)
        return None
