"""Safetensors files that know their own content: a flipped bit does not pass for a number, a name or a shape."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_sealed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous CPU tensors with the sha256 of their names, types, shapes and values in the file's metadata."""
    save_file(tensors, path, metadata={"sha256": _checksum(tensors)})


def load_sealed(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `save_sealed` wrote.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged, or was written by something else.
    """
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            metadata = opened.metadata()
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata != {"sha256": _checksum(tensors)}:
        raise ValueError("other values than were written")
    return tensors


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
