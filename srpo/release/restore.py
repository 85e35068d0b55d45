"""`srpo restore`: the adapter of a registered version, from DVC's cache or remote, whatever dvc.lock says by now."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.errors import UserError, one_line
from srpo.lineage.record import adapter_weights
from srpo.release import registry
from srpo.runtime.extras import require
from srpo.storage.hashing import dvc_digest, file_digest

if TYPE_CHECKING:
    from dvc.repo import Repo


def restore(params: Params, root: Path, which: str, to: Path | None = None) -> str:
    """Bring back the adapter of a version, and say so in one line.

    The version's tags name the adapter's folder by DVC's hash, which finds it in the cache or on the default remote
    even if no commit holds that dvc.lock. Its weights must then have the sha256 of the tag and of their lineage.json.

    Args:
        which: number or alias of a version.
        to: the folder to make; default `restored/<version>`.

    Raises:
        UserError: DVC or MLflow is not installed; no such version; DVC does not have it; the folder holds something
            else; or a hash is wrong.
    """
    require("dvc", "`srpo restore`")
    version = registry.look_up(params, root, which)
    tags = version.tags
    name, dvc_hash, sha256 = f"version {registry.number(version)}", tags["dvc.adapter"], tags["srpo.adapter"]
    target = to or root / "restored" / registry.number(version)
    line = f"{_shown(root, target)}: {name}, round {tags['srpo.round']}, adapter sha256 {sha256}"
    if target.exists():
        if not target.is_dir() or dvc_digest(target) != dvc_hash:
            raise UserError(f"{_shown(root, target)}: is there and is not {name}; remove it or name another with --to")
        return f"{line}, was there already"
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, so that it gets there in one rename, on whatever disk that is
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary) / "adapter"
        fetch(root, dvc_hash, folder, name)
        weights, lineage = adapter_weights(folder), folder / "lineage.json"
        told = json.loads(lineage.read_text(encoding="utf-8"))["adapter"] if lineage.exists() else None
        if weights is None or not file_digest(weights) == sha256 == told:
            raise UserError(f"{name}: what DVC has as {dvc_hash} is not the adapter {sha256}; nothing is restored")
        folder.replace(target)
    return f"{line}, verified"


def fetch(root: Path, dvc_hash: str, folder: Path, name: str) -> None:
    """Copy the files that DVC keeps under a folder's hash (`<md5>.dir`) into `folder`, from the cache or the remote.

    Raises:
        UserError: neither has all of them; the text calls what is missing by `name`.
    """
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    wanted = HashInfo("md5", dvc_hash)
    with Repo(str(root)) as repo:
        files, why = _cached(repo, wanted), ""
        if files is None:
            try:
                repo.cloud.pull([wanted])  # the listing, and then what it lists
                repo.cloud.pull([item for _, _, item in load(repo.cache.local, wanted)])
            except Exception as error:  # whatever a remote can do wrong
                why = f" ({one_line(error):.160})"
            files = _cached(repo, wanted)
    if files is None:
        raise UserError(
            f"{name}: its adapter, {dvc_hash}, is neither in DVC's cache nor on the default remote{why};"
            " `dvc remote default` names the remote, `dvc push` there is what puts it on one"
        )
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / path)


def _cached(repo: Repo, wanted) -> dict[str, str] | None:
    """The cache's files of a folder by their relative path; None unless all are there."""
    from dvc_data.hashfile import load

    cache = repo.cache.local
    if not cache.exists(wanted.value):
        return None
    files = {"/".join(parts): cache.oid_to_path(item.value) for parts, _, item in load(cache, wanted)}
    return files if all(Path(path).exists() for path in files.values()) else None


def _shown(root: Path, path: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
