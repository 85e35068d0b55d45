"""Safetensors files with a checksum of their content in the file's metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from srpo.storage.files import atomic_write


def save_with_checksum(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous CPU tensors atomically, with the sha256 of their names, dtypes, shapes and values."""
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata={"sha256": _checksum(tensors)})


def load_with_checksum(path: Path) -> dict[str, torch.Tensor]:
    """Load a file that `save_with_checksum` wrote, and verify its checksum.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is damaged, or has no such checksum.
    """
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata()
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata != {"sha256": _checksum(tensors)}:
        raise ValueError("checksum mismatch")
    return tensors


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        checksum.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        checksum.update(tensor.view(torch.uint8).numpy().data)
    return checksum.hexdigest()
