"""Restore of a registered version's adapter from DVC's cache or remote, whatever dvc.lock has now."""

from __future__ import annotations

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
from srpo.storage.json_files import read_json

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo


def restore(params: Params, root: Path, which: str, to: Path | None = None) -> str:
    """Restore the adapter of a version and return one line about it.

    The version's tags have DVC's hash of the adapter folder, by which it is found in the cache or on the default remote
    even if no commit has that dvc.lock. Its weights must have the sha256 of the tag and of their lineage.json.

    Args:
        which: number or alias of a version.
        to: the folder to make; default `restored/<version>`.

    Raises:
        UserError: DVC or MLflow is not installed; no such version; DVC does not have it; `to` holds something else;
            or a hash does not match.
    """
    require("dvc", "`srpo restore`")
    version = registry.look_up(params, root, which)
    tags = version.tags
    name, dvc_hash, sha256 = f"version {registry.number(version)}", tags["dvc.adapter"], tags["srpo.adapter"]
    target = to or root / "restored" / registry.number(version)
    line = f"{_shown(root, target)}: {name}, round {tags['srpo.round']}, adapter sha256 {sha256}"
    if target.exists():
        if not target.is_dir() or dvc_digest(target) != dvc_hash:
            raise UserError(
                f"{_shown(root, target)}: exists and is not {name}; remove it or name another folder with --to"
            )
        return f"{line}, already restored"
    target.parent.mkdir(parents=True, exist_ok=True)
    # on the same disk, so that one rename publishes it
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary) / "adapter"
        fetch(root, dvc_hash, folder, name)
        weights, lineage = adapter_weights(folder), folder / "lineage.json"
        recorded = read_json(lineage)["adapter"] if lineage.exists() else None
        if weights is None or not file_digest(weights) == sha256 == recorded:
            raise UserError(
                f"{name}: DVC's {dvc_hash} is not the adapter {sha256}, so nothing is restored; remove it from DVC's"
                " cache and run the same command again"
            )
        folder.replace(target)
    return f"{line}, verified"


def fetch(root: Path, dvc_hash: str, folder: Path, name: str) -> None:
    """Copy a folder that DVC has under this hash (`<md5>.dir`) into `folder`, from the cache or the remote.

    Args:
        name: the version, for messages.

    Raises:
        UserError: neither has all of its files.
    """
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    wanted = HashInfo("md5", dvc_hash)
    with Repo(str(root)) as repo:
        files, why = _cached(repo, wanted), ""
        if files is None:
            try:
                repo.cloud.pull([wanted])  # the listing, then the files in it
                repo.cloud.pull([item for _, _, item in load(repo.cache.local, wanted)])
            except Exception as error:  # a remote may fail in any way
                why = f" ({one_line(error):.160})"
            files = _cached(repo, wanted)
    if files is None:
        raise UserError(
            f"{name}: its adapter, {dvc_hash}, is neither in DVC's cache nor on the default remote{why};"
            " `dvc push` it from the clone that has it, or name its remote with `dvc remote default`"
        )
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / path)


def _cached(repo: Repo, wanted: HashInfo) -> dict[str, str] | None:
    """Return the cached files of a folder by relative path; None unless all of them are cached."""
    from dvc_data.hashfile import load

    cache = repo.cache.local
    if not cache.exists(wanted.value):
        return None
    files = {"/".join(parts): cache.oid_to_path(item.value) for parts, _, item in load(cache, wanted)}
    return files if all(Path(path).exists() for path in files.values()) else None


def _shown(root: Path, path: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
