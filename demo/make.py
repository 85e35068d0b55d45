"""Make the tiny world: `python -m demo.make data`. About an hour on two cores."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from demo.scenes import Scene, all_scenes, miscaptioned, render
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE

log = logging.getLogger("demo")
WRONG = 0.15  # per part of a caption: about four captions in ten name something that is not there


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    images_per_scene: int = 24
    vae_steps: int = 3000
    clip_steps: int = 1200
    base_steps: int = 7000


QUICK = Effort(images_per_scene=1, vae_steps=5, clip_steps=5, base_steps=5)


def make_world(out: Path, effort: Effort = Effort()) -> None:
    """Write prompts, templates, reference images, reward, judge and base under `out`. What is there is kept."""
    scenes, rng = all_scenes(), np.random.default_rng(0)
    train, held_out = split(scenes)
    write_prompts(out / "prompts" / "train.jsonl", train, "train")
    write_prompts(out / "prompts" / "eval.jsonl", held_out, "eval")
    write_images(out / "templates.parquet", [(scene.caption, render(scene)) for scene in scenes])
    reference = [(scene.caption, render(scene, rng)) for scene in held_out for _ in range(6)]
    write_images(out / "reference" / "reference.parquet", reference)
    labels = np.repeat(np.arange(len(scenes)), effort.images_per_scene)
    images = np.stack([render(scenes[label], rng) for label in labels])
    _train_models(out, effort, scenes, labels, images, rng)


def split(scenes: list[Scene]) -> tuple[list[Scene], list[Scene]]:
    """140 scenes to train on and 60 others to judge by; every color, shape and place is in both."""
    order = np.random.default_rng(3).permutation(len(scenes))
    return [scenes[i] for i in order[:140]], [scenes[i] for i in order[140:200]]


def write_prompts(path: Path, scenes: list[Scene], prefix: str) -> None:
    """JSON lines as srpo reads them, the scene's parts as tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{prefix}-{i:04d}", "prompt": scene.caption, "tags": vars(scene)})
        for i, scene in enumerate(scenes)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_images(path: Path, images: list[tuple[str, np.ndarray]]) -> None:
    """A parquet file with columns image and prompt, from pairs of prompt and image."""
    rows = [{"image": encode_image(pixels), "prompt": prompt} for prompt, pixels in images]
    parquet.write_table(path, rows, {"image": IMAGE, "prompt": pa.string()})


def _train_models(
    out: Path, effort: Effort, scenes: list[Scene], labels: np.ndarray, images: np.ndarray, rng: np.random.Generator
) -> None:
    from diffusers import AutoencoderKL

    from demo.base import encode, train_base, train_vae
    from demo.clip import train_clip
    from demo.text import make_tokenizer

    captions = [scene.caption for scene in scenes]
    tokenizer = make_tokenizer(captions, out / "work" / "tokenizer")
    vae_folder = out / "work" / "vae"
    if not vae_folder.exists():
        train_vae(images, steps=effort.vae_steps).save_pretrained(vae_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    vae.register_to_config(_name_or_path="")  # else this machine's path goes into the shipped config
    latents = encode(vae, images)
    # different seeds and sizes, so that what fools one need not fool the other
    for name, seed, width, layers in (("reward", 11, 48, 2), ("judge", 12, 80, 3)):
        if not (out / name).exists():
            train_clip(
                images, labels, captions, tokenizer, out / name,
                seed=seed, width=width, layers=layers, steps=effort.clip_steps,
            )  # fmt: skip
    if not (out / "base").exists():
        told = [miscaptioned(scenes[label], rng, WRONG).caption for label in labels]
        train_base(latents, told, vae, tokenizer, out / "base", steps=effort.base_steps, on_checkpoint=_show(out))


def _show(out: Path):
    """At a checkpoint: log the exact judge's accuracy on train prompts and keep a sheet of images."""
    import torch
    from PIL import Image

    from srpo.data.prompts import load_prompts
    from srpo.rewards.templates import TemplateReward

    judge = TemplateReward(str(out / "templates.parquet"), None, torch.device("cpu"))
    prompts = [prompt.prompt for prompt in load_prompts(out / "prompts" / "train.jsonl")][:96]

    def show(pipeline, step: int) -> None:
        for guidance in (1.0, 2.0, 3.0):
            images = pipeline(
                prompts, num_inference_steps=12, guidance_scale=guidance, height=64, width=64, output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
            pixels = (images * 255).round().astype(np.uint8)
            accuracy = judge.score(torch.from_numpy(pixels).permute(0, 3, 1, 2), prompts).mean().item()
            log.info("base, step %d, guidance %.1f: accuracy %.3f", step, guidance, accuracy)
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pixels.reshape(6, 16, 64, 64, 3)])
        Image.fromarray(sheet).save(out / "work" / "base.png")

    return show


def main(
    out: Annotated[Path, typer.Argument(help="folder to write, such as data")],
    quick: Annotated[bool, typer.Option(help="a minute's worth: everything runs, nothing is learned")] = False,
) -> None:
    """Make the tiny world."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    make_world(out, QUICK if quick else Effort())


if __name__ == "__main__":
    typer.run(main)
