"""Safetensors files with a checksum of their content, so that a flipped bit is seen when the file is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from srpo.storage.files import atomic_write


def save_with_checksum(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous CPU tensors atomically, with the sha256 of their names, dtypes, shapes and values.

    Args:
        metadata: more texts for the file's metadata; the sha256 covers them.
    """
    texts = dict(metadata or {})
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata=texts | {"sha256": _checksum(tensors, texts)})


def load_with_checksum(path: Path) -> dict[str, torch.Tensor]:
    """Load a file that `save_with_checksum` wrote, and verify its checksum.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is damaged, or has no such checksum.
    """
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    checksum = metadata.pop("sha256", None)
    if checksum != _checksum(tensors, metadata):
        raise ValueError("checksum mismatch")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts of a file's metadata, without reading its tensors."""
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def _checksum(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if metadata:
        checksum.update(repr(sorted(metadata.items())).encode())
    return checksum.hexdigest()
