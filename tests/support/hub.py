"""The Hub's cache on disk, filled with small random models under published names, and a Hub that takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from srpo.config.loader import Params
from srpo.config.reward_families import FAMILIES
from tests.evaluation.test_inception import StandIn
from tests.rewards.checkpoints import clip_folder, hps_folder
from tests.support.world import _pipeline, _tokenizer, random_vae


def build_home(home: Path, params: Params) -> dict[str, str]:
    """Everything the SDXL preset loads, under `home`; returns the environment in which it is found, offline."""
    cache, scratch, model = home / "hub", home / "scratch", params.model
    add_model(cache, model.base, model.revision, sdxl_folder(scratch / "base", model.variant))
    add_model(cache, model.vae, model.vae_revision, vae_folder(scratch / "vae"))
    builders = {
        "pickscore": clip_folder,
        "clip": clip_folder,
        "hpsv2.1": lambda folder: hps_folder(folder, "HPS_v2.1_compressed.pt"),
    }
    for name, spec in params.rewards.items():
        add_model(cache, spec.model, spec.revision, builders[spec.kind](scratch / name))
    tokenizer = FAMILIES["hpsv2.1"].companion
    _tokenizer(scratch / "words").save_pretrained(scratch / "words")
    (scratch / "words" / "config.json").write_text('{"model_type": "clip"}')  # AutoTokenizer asks for it first
    add_model(cache, tokenizer.model, tokenizer.revision, scratch / "words")
    checkpoints = home / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.jit.script(StandIn()).save(checkpoints / "inception-2015-12-05.pt")
    shutil.rmtree(scratch)
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(home / "torch")}


def add_model(cache: Path, name: str, revision: str, folder: Path) -> None:
    """A folder's files as blobs by their hash, linked from a snapshot, with a ref `main` on the revision."""
    root = cache / f"models--{name.replace('/', '--')}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = root / "snapshots" / revision / file.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)


def sdxl_folder(folder: Path, variant: str) -> Path:
    """As stabilityai/stable-diffusion-xl-base-1.0: half precision under the variant's names, a VAE that upcasts."""
    torch.manual_seed(0)
    pipeline = _pipeline(_tokenizer(folder.parent / "vocabulary"))
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(dtype=torch.float16).save_pretrained(folder, variant=variant, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
        tokenizer_folder(folder / name)
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """vocab.json and merges.txt without a tokenizer.json, as Stability's repository has them."""
    _tokenizer(folder)
    return folder


def vae_folder(folder: Path) -> Path:
    """As madebyollin/sdxl-vae-fp16-fix: no variant, no upcasting, and other weights than the base's."""
    torch.manual_seed(1)
    random_vae(scaling_factor=0.13025).save_pretrained(folder, safe_serialization=True)
    return folder


class FakeHub:
    """A server on loopback that answers the requests by which huggingface_hub creates a repository and uploads to it.

    `files` are the uploaded bytes by path, `visibility` is what was asked of the new repository. A request without the
    `token` is answered with 401, one that creates a repository of another `owner` with 403.
    """

    def __init__(self, token: str, owner: str) -> None:
        self.token, self.owner = token, owner
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None
        self.commits: list[str] = []
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._answer(401, {"error": "Invalid username or password."})
                else:
                    self._answer(*hub._post(self.path, body))

            def do_PUT(self) -> None:
                hub._blobs[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(200, {})

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            if wanted.get("organization") != self.owner:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            self.visibility = wanted.get("visibility")
            return 200, {"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{"actions": {"upload": {"href": f"{self.url}/blob/{item['oid']}"}}} for item in objects]
            return 200, {"objects": [item | upload for item, upload in zip(objects, uploads, strict=True)]}
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
            commit = path.removeprefix("/api/models").replace("/commit/main", f"/commit/{'0' * 40}")
            return 200, {"commitUrl": f"{self.url}{commit}", "commitOid": "0" * 40, "success": True}
        return 404, {"error": path}

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.files[value["path"]] = self._blobs[value["oid"]]
