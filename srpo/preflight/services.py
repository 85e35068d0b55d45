"""What a campaign must reach: models, the DVC remote, the tracking and the flow server. Loads no weights."""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import uuid4

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION, ModelParams
from srpo.errors import UserError, one_line, without_secrets
from srpo.lineage.checkpoint_files import check_checkpoint
from srpo.lineage.identity import COMMIT, HUB_ID
from srpo.rewards.families import FAMILIES

if TYPE_CHECKING:
    import httpx
    from dvc.repo import Repo

SECONDS = 15.0  # a busy machine is no dead one
INCEPTION_FILE = "inception-2015-12-05.pt"
# the file without which a family's model is not there
FILES = {
    "clip": "model.safetensors",
    "pickscore": "model.safetensors",
    "hpsv2": "HPS_v2_compressed.pt",
    "hpsv2.1": "HPS_v2.1_compressed.pt",
    "imagereward": "ImageReward.pt",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
    "vqascore": "config.json",
}
CLIP_H_WORDS = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c", "vocab.json")
# the second repository that a family loads from when its model is on the Hub: id, revision, file
COMPANIONS = {
    "hpsv2": CLIP_H_WORDS,
    "hpsv2.1": CLIP_H_WORDS,
    "imagereward": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt"),
    "aesthetic": (
        "openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        "model.safetensors",
    ),
}


class Finding(NamedTuple):
    """One line of `srpo check`: what was looked at, how it stands, and what was found and is to be done."""

    what: str
    state: Literal["ok", "warn", "fail"]
    text: str


class Wanted(NamedTuple):
    """Files of one model, by the key of params.yaml that names it."""

    key: str
    source: str
    revision: str | None
    files: tuple[str, ...]


def find_models(params: Params, root: Path) -> list[Finding]:
    """A finding for each model: in a local folder, in the Hub's cache, or on the Hub, asked with one HEAD a file."""
    found: list[Finding] = []
    unreachable = False
    for wanted in _wanted(params, root):
        if wanted.key == "model.base" and (root / wanted.source).exists():
            finding = _find_local_base(params.model, root)
        else:
            finding = _find_model(wanted, root, unreachable)
        unreachable = unreachable or "can't be reached" in finding.text
        found.append(finding)
    if params.evaluate.features == INCEPTION:
        found.append(_find_inception())
    return found


def _wanted(params: Params, root: Path) -> Iterator[Wanted]:
    model, suffix = params.model, f".{params.model.variant}" if params.model.variant else ""
    parts = ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")
    files = ("model_index.json", *(f"{part}{suffix}.safetensors" for part in parts))
    yield Wanted("model.base", model.base, model.revision, files)
    if model.vae:
        # a local one may be a VAE's folder or a whole pipeline's
        files = () if (root / model.vae).exists() else ("config.json", "diffusion_pytorch_model.safetensors")
        yield Wanted("model.vae", model.vae, model.vae_revision, files)
    for name, spec in params.rewards.items():
        if spec.kind not in FAMILIES or spec.model is None:
            continue  # a class of the user's own loads what it likes
        key = f"rewards.{name}.model"
        yield Wanted(key, spec.model, spec.revision, (FILES[spec.kind],) if spec.kind in FILES else ())
        if spec.kind in COMPANIONS and not (root / spec.model).exists():
            source, revision, file = COMPANIONS[spec.kind]
            yield Wanted(f"rewards.{name} needs", source, revision, (file,))


def _find_local_base(model: ModelParams, root: Path) -> Finding:
    path = root / model.base
    try:
        check_checkpoint("model.base", path, model.variant, own_vae=not model.vae)
    except UserError as error:
        return Finding("model.base", "fail", str(error).removeprefix("model.base: ").replace(f"{root}/", ""))
    return Finding("model.base", "ok", f"{model.base}, a local {'folder' if path.is_dir() else 'file'}")


def _find_model(wanted: Wanted, root: Path, unreachable: bool) -> Finding:
    key, source, revision, files = wanted
    local = root / source
    if local.exists():
        missing = [name for name in files if local.is_dir() and not (local / name).exists()]
        if missing:
            return Finding(key, "fail", f"{source} holds no {missing[0]}; bring the whole model there")
        return Finding(key, "ok", f"{source}, a local {'folder' if local.is_dir() else 'file'}")
    if not HUB_ID.fullmatch(source) or source.startswith("data/"):
        return Finding(key, "fail", f"{source} is no folder here and no Hub id; `dvc pull` brings what DVC tracks")
    from huggingface_hub import try_to_load_from_cache

    missing = [name for name in files if not isinstance(try_to_load_from_cache(source, name, revision=revision), str)]
    if missing and unreachable:
        return Finding(key, "fail", f"{source} is not in the Hub's cache, and the Hub can't be reached")
    for name in missing:
        if problem := _hub_problem(source, name, revision):
            return Finding(key, "fail", f"{source}: {problem}")
    where = "on the Hub, to be downloaded" if missing else "in the Hub's cache"
    if not revision or not COMMIT.fullmatch(revision):
        return Finding(key, "warn", f"{source}, {where}, but not pinned: set its revision to a commit")
    return Finding(key, "ok", f"{source}@{revision[:8]}, {where}")


def _hub_problem(source: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source, name, revision=revision), timeout=SECONDS)
    except errors.GatedRepoError:
        return "asks you to accept terms on its page; accept them and run `hf auth login`"
    except errors.RevisionNotFoundError:
        return f"has no revision {revision}"
    except errors.EntryNotFoundError:
        return f"has no file {name} at this revision; is it the right model (and model.variant)?"
    except errors.RepositoryNotFoundError:
        return "the Hub has no such repository, or it needs a login"
    except errors.OfflineModeIsEnabled:
        return f"not in the Hub's cache ({name}), and HF_HUB_OFFLINE is set; run once online or name a local folder"
    except Exception as error:  # whatever the Hub's client speaks over
        return (
            f"not in the Hub's cache, and the Hub can't be reached ({type(error).__name__});"
            " run once online or name a local folder"
        )
    return None


def _find_inception() -> Finding:
    home = os.environ.get("TORCH_HOME") or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/torch"
    path = Path(home).expanduser() / "hub" / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return Finding("evaluate.features", "ok", f"{path}")
    return Finding(
        "evaluate.features",
        "warn",
        f"InceptionV3 will be downloaded (96 MB) by the first evaluate; without a network bring it to {path}",
    )


def find_remote(repo: Repo) -> Finding:
    """Whether DVC's default remote takes a small object and gives it up again."""
    name = repo.config["core"].get("remote")
    if not name:
        text = "no default remote: rounds stay on this disk alone; `dvc remote add --default store s3://bucket/path`"
        return Finding("dvc remote", "warn", text)
    try:
        remote, url = repo.cloud.get_remote(), repo.config["remote"][name]["url"]
        fs, probe = remote.fs, remote.fs.join(remote.path, f"srpo-check-{uuid4().hex}")
        fs.makedirs(remote.path, exist_ok=True)  # nothing on an object store
        fs.pipe_file(probe, b"srpo check")
        fs.rm_file(probe)
    except Exception as error:  # DVC's own, the store's client's, the operating system's
        text = f"can't be written to: {_one_line(error)}; mend `dvc remote` or its credentials"
        return Finding("dvc remote", "fail", text)
    return Finding("dvc remote", "ok", f"{name}: {without_secrets(url)} takes and gives up an object")


def find_mlflow(uri: str) -> Finding:
    """Whether the tracking server answers as one, to this name for it and these credentials."""
    if not uri.startswith(("http://", "https://")):
        return Finding("mlflow", "ok", f"{without_secrets(uri)}: no server to ask")
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    user, password = (os.environ.get(name) for name in names)
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    auth = (user, password) if user and password else None
    hints = {
        403: "it refuses this name for it: start it with --allowed-hosts, see docs/how-to/servers.md",
        401: f"it wants {' and '.join(names)}",
    }
    return _find_server("mlflow", address, uri, hints, params={"max_results": 1}, auth=auth)


def find_prefect() -> Finding:
    """Whether the Prefect server that is configured, if any, answers to these credentials."""
    address = _prefect_address()
    if address is None:
        return Finding("prefect", "ok", "none configured: a flow brings its own; PREFECT_API_URL names one")
    hints = dict.fromkeys((401, 403), "it wants PREFECT_API_AUTH_STRING or PREFECT_API_KEY")
    key, pair = os.environ.get("PREFECT_API_KEY"), os.environ.get("PREFECT_API_AUTH_STRING")
    auth = tuple(pair.split(":", 1)) if pair and ":" in pair else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return _find_server(
        "prefect", f"{address.rstrip('/')}/flows/count", address, hints, "POST", json={}, auth=auth, headers=headers
    )


def _prefect_address() -> str | None:
    """As Prefect resolves it: the environment, then the active profile."""
    if address := os.environ.get("PREFECT_API_URL"):
        return address
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
        return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return None


def _find_server(what: str, address: str, shown: str, hints: dict[int, str], method: str = "GET", **request) -> Finding:
    import httpx

    shown = without_secrets(shown)
    try:
        answer: httpx.Response = httpx.request(method, address, timeout=SECONDS, **request)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return Finding(
            what, "fail", f"{shown} does not answer ({type(error).__name__}); start it, see docs/how-to/servers.md"
        )
    if answer.is_success:
        return Finding(what, "ok", f"{shown} answers")
    hint = hints.get(answer.status_code, "is it the right address?")
    return Finding(what, "fail", f"{shown} answers {answer.status_code}; {hint}")


def _one_line(error: Exception) -> str:
    return f"{without_secrets(one_line(error)):.160}" or type(error).__name__
