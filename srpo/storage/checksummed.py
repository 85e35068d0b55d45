"""Safetensors files that know their own content: a flipped bit does not pass for a number, a name or a shape."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_sealed(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous CPU tensors with the sha256 of their names, types, shapes and values in the file's metadata.

    Args:
        metadata: more texts for the file's metadata; the sha256 covers them.
    """
    texts = dict(metadata or {})
    save_file(tensors, path, metadata=texts | {"sha256": _checksum(tensors, texts)})


def load_sealed(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that `save_sealed` wrote.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged, or was written by something else.
    """
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    checksum = metadata.pop("sha256", None)
    if checksum != _checksum(tensors, metadata):
        raise ValueError("other values than were written")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts of a file's metadata, without looking at its tensors."""
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def _checksum(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    if metadata:
        found.update(repr(sorted(metadata.items())).encode())
    return found.hexdigest()
