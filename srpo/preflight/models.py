"""Checks that models are in local folders, in the Hub's cache or on the Hub. Loads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from srpo.config.loader import Params
from srpo.config.reward_families import FAMILIES
from srpo.config.schema import INCEPTION
from srpo.errors import UserError
from srpo.lineage.checkpoint_files import EDM_WEIGHTS, check_checkpoint, is_edm_checkpoint, lora_file
from srpo.lineage.identity import COMMIT, HUB_ID
from srpo.preflight import CheckResult

TIMEOUT_SECONDS = 15.0
INCEPTION_FILE = "inception-2015-12-05.pt"
UNREACHABLE = "the Hub can't be reached"


class RequiredModel(NamedTuple):
    """A model, the key of params.yaml that names it, and the files it must have."""

    key: str
    source: str
    revision: str | None
    files: tuple[str, ...]


def check_models(params: Params, root: Path) -> list[CheckResult]:
    """Check each model: a local folder, the Hub's cache, or the Hub, asked with one HEAD request per file."""
    results: list[CheckResult] = []
    unreachable = False
    for model in _required_models(params, root):
        if model.key == "model.base" and (root / model.source).exists():
            result = _check_local_base(params, root)
        else:
            result = _check_model(model, root, unreachable)
        unreachable = unreachable or UNREACHABLE in result.text
        results.append(result)
    results += [_check_lora(root, number, lora.path) for number, lora in enumerate(params.model.loras)]
    if params.evaluate.features == INCEPTION:
        results.append(_check_inception())
    return results


def find_base_file(params: Params, root: Path, *names: str) -> Path | None:
    """Return the first of these files of the base model if all are on this machine, else None."""
    model = params.model
    if (root / model.base).exists():
        paths = [root / model.base / name for name in names]
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = [try_to_load_from_cache(model.base, name, revision=model.revision) for name in names]
        except HFValidationError:
            return None
        paths = [Path(path) for path in cached if isinstance(path, str)]
    return paths[0] if len(paths) == len(names) and all(path.is_file() for path in paths) else None


def _required_models(params: Params, root: Path) -> Iterator[RequiredModel]:
    model = params.model
    suffix = f".{model.variant}" if model.variant else ""
    parts = ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")
    files = ("model_index.json", *(f"{part}{suffix}.safetensors" for part in parts))
    yield RequiredModel("model.base", model.base, model.revision, files)
    if model.vae:
        # a local one may be the folder of a VAE or of a whole pipeline
        files = () if (root / model.vae).exists() else ("config.json", "diffusion_pytorch_model.safetensors")
        yield RequiredModel("model.vae", model.vae, model.vae_revision, files)
    for name, spec in params.rewards.items():
        family = FAMILIES.get(spec.kind)
        if family is None or spec.model is None:
            continue  # a user's own class loads its files itself
        yield RequiredModel(f"rewards.{name}.model", spec.model, spec.revision, (family.file,) if family.file else ())
        if family.companion and not (root / spec.model).exists():
            source, revision, file = family.companion
            yield RequiredModel(f"rewards.{name} needs", source, revision, (file,))


def _check_local_base(params: Params, root: Path) -> CheckResult:
    """Check a local base as generate and train do, by its configuration and the headers of its files."""
    model = params.model
    path = root / model.base
    try:
        check_checkpoint("model.base", path, model.variant, not model.vae, model.scheduler)
    except UserError as error:
        return CheckResult("model.base", "fail", str(error).removeprefix("model.base: ").replace(f"{root}/", ""))
    if params.train.snr_gamma is not None and is_edm_checkpoint(path):
        return CheckResult("train.snr_gamma", "fail", EDM_WEIGHTS)
    return CheckResult("model.base", "ok", f"{model.base}, a local {'folder' if path.is_dir() else 'file'}")


def _check_lora(root: Path, number: int, source: str) -> CheckResult:
    key = f"model.loras.{number}"
    try:
        lora_file(key, root, source)
    except UserError as error:
        return CheckResult(key, "fail", str(error).removeprefix(f"{key}: "))
    return CheckResult(key, "ok", f"{source}, a local file")


def _check_model(model: RequiredModel, root: Path, unreachable: bool) -> CheckResult:
    key, source, revision, files = model
    local = root / source
    if local.exists():
        missing = [name for name in files if local.is_dir() and not (local / name).exists()]
        if missing:
            return CheckResult(key, "fail", f"{source} has no file {missing[0]}; copy the complete model there")
        return CheckResult(key, "ok", f"{source}, a local {'folder' if local.is_dir() else 'file'}")
    if not HUB_ID.fullmatch(source) or source.startswith("data/"):
        text = f"{source} is neither a local folder nor a Hub id; `dvc pull` fetches folders under DVC"
        return CheckResult(key, "fail", text)
    from huggingface_hub import try_to_load_from_cache

    missing = [name for name in files if not isinstance(try_to_load_from_cache(source, name, revision=revision), str)]
    if missing and unreachable:
        return CheckResult(key, "fail", f"{source} is not in the Hub's cache, and {UNREACHABLE}")
    for name in missing:
        if problem := _find_hub_problem(source, name, revision):
            return CheckResult(key, "fail", f"{source}: {problem}")
    place = "on the Hub, will be downloaded" if missing else "in the Hub's cache"
    if not revision or not COMMIT.fullmatch(revision):
        return CheckResult(key, "warn", f"{source}, {place}, but not pinned: set its revision to a commit")
    return CheckResult(key, "ok", f"{source}@{revision[:8]}, {place}")


def _find_hub_problem(source: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source, name, revision=revision), timeout=TIMEOUT_SECONDS)
    except errors.GatedRepoError:
        return "gated: accept the terms on its page and run `hf auth login`"
    except errors.RevisionNotFoundError:
        return f"no revision {revision}"
    except errors.EntryNotFoundError:
        return f"no file {name} at this revision; is it the right model (and model.variant)?"
    except errors.RepositoryNotFoundError:
        return "the Hub has no such repository, or it requires a login"
    except errors.OfflineModeIsEnabled:
        return f"{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set; run once online or name a local folder"
    except Exception as error:  # the Hub's client passes on errors of several transports
        cause = type(error).__name__
        return f"not in the Hub's cache, and {UNREACHABLE} ({cause}); run once online or name a local folder"
    return None


def _check_inception() -> CheckResult:
    home = os.environ.get("TORCH_HOME") or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/torch"
    path = Path(home).expanduser() / "hub" / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return CheckResult("evaluate.features", "ok", str(path))
    text = f"the first `srpo evaluate` downloads InceptionV3 (96 MB); without a network, copy it to {path}"
    return CheckResult("evaluate.features", "warn", text)
