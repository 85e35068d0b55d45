"""Make the tiny world: `python -m demo.make data`. Under three hours on two cores."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from PIL import Image

from demo.captions import KINDS, Caption, all_captions, detailed_captions, draw_scene
from demo.describe import describe
from demo.mistakes import any_value, confused_value, miscaption
from demo.scenes import Scene, render
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE

log = logging.getLogger("demo")
WRONG, CONFUSED = 0.1, 0.2
"""Probability that a part of a caption is wrong: scattered mistakes first, in the last steps fixed confusions."""
TRAIN_PROMPTS = {"object": 24, "place": 145, "background": 72, "count": 44, "pair": 40, "relation": 40}
EVAL_PROMPTS = {"object": 10, "place": 15, "background": 15, "count": 10, "pair": 5, "relation": 5}
"""How many prompts are of each kind. Some captions of all kinds but the first are left, to choose settings by."""
DETAILED_PROMPTS = 235
"""Train prompts that say place and background: there are too few others for three rounds of fresh ones."""
REFERENCES = 6
"""Reference images of each evaluation prompt."""


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    images: int = 24_000
    vae_steps: int = 9000
    clip_steps: int = 3000
    base_steps: int = 16_000
    confused_steps: int = 2_000


QUICK = Effort(images=60, vae_steps=5, clip_steps=5, base_steps=5, confused_steps=5)


@dataclass(frozen=True)
class Examples:
    """What the models are trained on: `captions[labels[i]]` is true of `scenes[i]`, which `images[i]` shows."""

    captions: list[Caption]
    labels: np.ndarray
    scenes: list[Scene]
    images: np.ndarray


def make_world(out: Path, effort: Effort = Effort(), device: str = "cpu") -> None:
    """Write prompts, reference images, reward, judge and base under `out`. What is there is kept."""
    train, held_out, _ = choose_prompts()
    write_prompts(out / "prompts" / "train.jsonl", train, "train")
    write_prompts(out / "prompts" / "eval.jsonl", held_out, "eval")
    write_reference(out / "reference" / "reference.parquet", held_out, np.random.default_rng(1))
    _train_models(out, effort, draw_examples(effort.images), torch.device(device))


def choose_prompts() -> tuple[list[Caption], list[Caption], list[Caption]]:
    """Return 600 prompts to train on, 60 others to judge by, and the captions that are left."""
    rng = np.random.default_rng(3)
    train: list[Caption] = []
    held_out: list[Caption] = []
    left: list[Caption] = []
    for kind, captions in all_captions().items():
        shuffled = [captions[i] for i in rng.permutation(len(captions))]
        ends = EVAL_PROMPTS[kind], EVAL_PROMPTS[kind] + TRAIN_PROMPTS[kind]
        held_out += shuffled[: ends[0]]
        train += shuffled[ends[0] : ends[1]]
        left += shuffled[ends[1] :]
    detailed = detailed_captions()
    train += [detailed[i] for i in rng.permutation(len(detailed))[:DETAILED_PROMPTS]]
    return train, held_out, left


def draw_examples(number: int) -> Examples:
    """Draw scenes for captions of all kinds, each equally often, and render them."""
    rng, by_kind = np.random.default_rng(0), all_captions()
    captions = [caption for kind in KINDS for caption in by_kind[kind]]
    first = dict(zip(KINDS, np.cumsum([0, *(len(by_kind[kind]) for kind in KINDS)]), strict=False))
    kinds = [KINDS[i % len(KINDS)] for i in range(number)]
    labels = np.array([first[kind] + rng.integers(len(by_kind[kind])) for kind in kinds])
    scenes = [draw_scene(captions[label], rng) for label in labels]
    return Examples(captions, labels, scenes, np.stack([render(scene, rng) for scene in scenes]))


def write_prompts(path: Path, captions: list[Caption], prefix: str) -> None:
    """JSON lines as srpo reads them, the kind of caption as a tag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{prefix}-{i:04d}", "prompt": caption.text, "tags": {"kind": caption.kind}})
        for i, caption in enumerate(captions)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_reference(path: Path, captions: list[Caption], rng: np.random.Generator) -> None:
    """A parquet file of REFERENCES images that show each caption, with columns image and prompt."""
    rows = [
        {"image": encode_image(render(draw_scene(caption, rng), rng)), "prompt": caption.text}
        for caption in captions
        for _ in range(REFERENCES)
    ]
    parquet.write_table(path, rows, {"image": IMAGE, "prompt": pa.string()})


def _train_models(out: Path, effort: Effort, examples: Examples, device: torch.device) -> None:
    from diffusers import AutoencoderKL

    from demo.base import make_pipeline, save_base, train_base
    from demo.clip import JUDGE, REWARD, train_clip
    from demo.text import make_tokenizer
    from demo.vae import encode, train_vae

    tokenizer = make_tokenizer([caption.text for caption in examples.captions], out / "work" / "tokenizer")
    images = torch.from_numpy(examples.images).permute(0, 3, 1, 2).contiguous().to(device)
    vae_folder = out / "work" / "vae"
    if not vae_folder.exists():
        train_vae(images, steps=effort.vae_steps).cpu().save_pretrained(vae_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    vae.register_to_config(_name_or_path="")  # else this machine's path goes into the shipped config
    for name, settings in (("reward", REWARD), ("judge", JUDGE)):
        if not (out / name).exists():
            train_clip(
                images, examples.scenes, examples.labels, examples.captions, tokenizer, out / name, settings,
                steps=effort.clip_steps,
            )  # fmt: skip
    if not (out / "base").exists():
        latents = encode(vae.to(device), images)
        pipeline = make_pipeline(vae, tokenizer, out / "reward").to(device)
        for wrong, other, steps, rate in (
            (WRONG, any_value, effort.base_steps, 1.5e-3), (CONFUSED, confused_value, effort.confused_steps, 8e-4),
        ):  # fmt: skip
            rng = np.random.default_rng(2)
            told = [miscaption(describe(scene, rng), rng, wrong, other).text for scene in examples.scenes]
            train_base(pipeline, latents, told, steps=steps, learning_rate=rate, on_checkpoint=_show(out))
        save_base(pipeline, out / "base")


def _show(out: Path):
    """At a checkpoint: log the exact judge's accuracy on training prompts by kind, and keep a sheet of images."""
    from demo.judge import SceneJudge

    judge = SceneJudge(None, None, torch.device("cpu"))
    train, _, _ = choose_prompts()
    captions = [train[i] for i in np.linspace(0, len(train) - 1, 72).astype(int)]

    def show(pipeline, step: int) -> None:
        for guidance in (1.0, 2.0, 3.0, 5.0):
            images = pipeline(
                [caption.text for caption in captions], num_inference_steps=12, guidance_scale=guidance, height=64,
                width=64, output_type="np", generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
            pixels = (images * 255).round().astype(np.uint8)
            right = judge.score(torch.from_numpy(pixels).permute(0, 3, 1, 2), [caption.text for caption in captions])
            by_kind = ", ".join(
                f"{kind} {right[[i for i, caption in enumerate(captions) if caption.kind == kind]].mean():.2f}"
                for kind in KINDS
            )
            log.info("base, step %d, guidance %.1f: accuracy %.3f (%s)", step, guidance, right.mean(), by_kind)
            sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pixels.reshape(6, 12, 64, 64, 3)])
            Image.fromarray(sheet).save(out / "work" / f"base-{guidance}.png")

    return show


def main(
    out: Annotated[Path, typer.Argument(help="folder to write, such as data")],
    quick: Annotated[bool, typer.Option(help="a minute's worth: everything runs, nothing is learned")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; the draws are the same, the rounding is not")] = "cpu",
) -> None:
    """Make the tiny world."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    make_world(out, QUICK if quick else Effort(), device)


if __name__ == "__main__":
    typer.run(main)
