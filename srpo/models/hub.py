"""Model files by Hub id and revision, or from a local folder or file, with errors of one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import errors, hf_hub_download

from srpo.errors import UserError, one_line, user_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNREACHABLE = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)


class Source(NamedTuple):
    """Where a part of a model is: a Hub id or local path, and the Hub revision."""

    model: str
    revision: str | None


def fetch(source: Source, name: str) -> Path:
    """Return the path of one file: the local file itself, or `name` in the local folder or Hub repository.

    Raises:
        UserError: it does not exist.
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


def sibling_or_default(source: Source, marker: str, default: Source) -> Source:
    """Return the source's own folder when it is local and holds the file `marker`, else `default`.

    For parts that a model needs and may not bring, such as a tokenizer.
    """
    path = Path(source.model)
    folder = path.parent if path.is_file() else path
    return Source(str(folder), None) if (folder / marker).is_file() else default


def load_state(source: Source, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint file on the CPU, by name. Only tensors are unpickled, never code.

    Raises:
        UserError: the file does not exist, or is not such a checkpoint.
    """
    path = fetch(source, name)
    with loading(Source(str(path), None)):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn any exception of loading this source into a UserError of one line."""
    with user_error(f"can't load {source.model!r}", reason=lambda error: _reason(error, source)):
        yield


def load_complete(kind: type[PreTrainedModel], source: str, **options: Any) -> PreTrainedModel:
    """Load one of transformers' models; by itself the library fills in random tensors that a checkpoint lacks.

    Raises:
        ValueError: the checkpoint lacks tensors.
    """
    model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
    return model


def hide_loading_bars() -> None:
    """Turn off the progress bars that diffusers and transformers, if imported, draw while they load weights.

    Bars of downloads stay. The Hub's warnings about retries go too: whoever loads reports the final error in one line.
    """
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    hub_logging.set_verbosity_error()  # not in cli.run: a later import of the Hub's client would undo it

    downloads = not are_progress_bars_disabled()
    for library in ("diffusers", "transformers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.disable_progress_bar()
    if downloads:  # transformers turns those off with its own
        enable_progress_bars()


def _reason(error: BaseException, source: Source) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, errors.GatedRepoError):
            return "its Hub repository asks you to accept terms; accept them and log in"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return "the Hub has no such repository, or it needs a login"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"its Hub repository has no revision {source.revision!r}"
    if not Path(source.model).exists() and any(
        isinstance(cause, UNREACHABLE) or type(cause).__name__ in ("ConnectError", "ConnectTimeout") for cause in chain
    ):
        return (
            "it is not a local folder or file, the Hub's cache lacks it and the Hub can't be reached;"
            " run once online, or give a local path"
        )
    text = re.sub(r"\S+://\S+", "", one_line(error))
    return f"{text:.200}"
