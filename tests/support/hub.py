"""The Hub's cache on disk, as huggingface_hub lays it out, filled with small random models under published names."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

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
