"""Models by Hub id and revision, or from a local folder or file; what goes wrong is one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import errors, hf_hub_download

from srpo.errors import UserError, one_line

UNREACHABLE = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)


class Source(NamedTuple):
    """Where a model's part is: a Hub id or local path, and the Hub revision."""

    model: str
    revision: str | None


def fetch(source: Source, name: str) -> Path:
    """The path of one file: the local file itself, or `name` in the local folder or Hub repository.

    Raises:
        UserError: it is not there.
    """
    path = Path(source.model)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / name).is_file():
            raise UserError(f"{path}: holds no {name}; put the file there or name it itself")
        return path / name
    with loading(source):
        return Path(hf_hub_download(source.model, name, revision=source.revision))


def beside(source: Source, marker: str, default: Source) -> Source:
    """The source's own folder when it is local and holds `marker`, else `default`: for a part a model lacks."""
    path = Path(source.model)
    folder = path.parent if path.is_file() else path
    return Source(str(folder), None) if (folder / marker).is_file() else default


def load_state(source: Source, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file on the CPU, by name. Only tensors are unpickled, never code.

    Raises:
        UserError: the file is not there, or is no such checkpoint.
    """
    path = fetch(source, name)
    with loading(Source(str(path), None)):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Whatever loading this source raises becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"can't load {source.model!r}: {_reason(error, source)}") from error


def _reason(error: Exception, source: Source) -> str:
    chain, at = [], error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    for found in chain:
        if isinstance(found, errors.GatedRepoError):
            return "its Hub repository asks you to accept terms; accept them and log in"
        if isinstance(found, errors.RepositoryNotFoundError):
            return "the Hub has no such repository, or it needs a login"
        if isinstance(found, errors.RevisionNotFoundError):
            return f"its Hub repository has no revision {source.revision!r}"
    if not Path(source.model).exists() and any(
        isinstance(found, UNREACHABLE) or type(found).__name__ in ("ConnectError", "ConnectTimeout") for found in chain
    ):
        return (
            "it is no folder or file here, the Hub's cache lacks it and the Hub can't be reached;"
            " run once online, or give a local path"
        )
    text = re.sub(r"\S+://\S+", "", one_line(error))
    return f"{text:.200}" or type(error).__name__
