"""Make the open world: `python -m demo.open_world.make folder`. Under three hours on two cores."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from demo.make import write_images
from demo.open_world.captions import KINDS, Caption, all_captions, draw_scene, miscaption
from demo.open_world.describe import describe
from demo.open_world.scenes import Scene, render

log = logging.getLogger("demo")
WRONG, CARELESS = 0.1, 0.25
"""Probability that a part of a caption is wrong: of those that the base learns from first, and of the last ones."""
SHARES = {"object": 2, "place": 3, "background": 3, "count": 2, "pair": 1, "relation": 1}
"""How many of the prompts are of each kind: two shapes are the hardest, for real models too."""
TRAIN_PROMPTS, EVAL_PROMPTS, REFERENCES = 12, 5, 6
"""Prompts of a kind for each of its shares, and reference images of each evaluation prompt."""


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    images: int = 24_000
    vae_steps: int = 9000
    clip_steps: int = 3000
    base_steps: int = 16_000
    careless_steps: int = 1_500


QUICK = Effort(images=60, vae_steps=5, clip_steps=5, base_steps=5, careless_steps=5)


@dataclass(frozen=True)
class Examples:
    """What the models are trained on: `captions[labels[i]]` is true of `scenes[i]`, which `images[i]` shows."""

    captions: list[Caption]
    labels: np.ndarray
    scenes: list[Scene]
    images: np.ndarray


def make_world(out: Path, effort: Effort = Effort(), device: str = "cpu") -> None:
    """Write prompts, reference images, reward, judge and base under `out`. What is there is kept."""
    train, held_out = choose_prompts()
    write_prompts(out / "prompts" / "train.jsonl", train, "train")
    write_prompts(out / "prompts" / "eval.jsonl", held_out, "eval")
    write_reference(out / "reference" / "reference.parquet", held_out, np.random.default_rng(1))
    _train_models(out, effort, draw_examples(effort.images), torch.device(device))


def choose_prompts() -> tuple[list[Caption], list[Caption]]:
    """Return 144 prompts to train on and 60 others to judge by, each kind by its share."""
    train: list[Caption] = []
    held_out: list[Caption] = []
    for captions, share in shuffled_captions():
        held_out += captions[: EVAL_PROMPTS * share]
        train += captions[EVAL_PROMPTS * share :][: TRAIN_PROMPTS * share]
    return train, held_out


def shuffled_captions() -> list[tuple[list[Caption], int]]:
    """Return for each kind all its captions, in a random order that is always the same, and its share of prompts."""
    rng, by_kind = np.random.default_rng(3), all_captions()
    return [([by_kind[kind][i] for i in rng.permutation(len(by_kind[kind]))], share) for kind, share in SHARES.items()]


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
    """REFERENCES images that show each caption, as `write_images` writes them."""
    shown = [(caption.text, render(draw_scene(caption, rng), rng)) for caption in captions for _ in range(REFERENCES)]
    write_images(path, shown)


def _train_models(out: Path, effort: Effort, examples: Examples, device: torch.device) -> None:
    from diffusers import AutoencoderKL

    from demo.base import save_base
    from demo.open_world.base import make_pipeline, train_base
    from demo.open_world.clip import JUDGE, REWARD, train_clip
    from demo.open_world.vae import encode, train_vae
    from demo.text import make_tokenizer

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
        for wrong, steps, rate in ((WRONG, effort.base_steps, 1.5e-3), (CARELESS, effort.careless_steps, 8e-4)):
            rng = np.random.default_rng(2)
            told = [miscaption(describe(scene, rng), rng, wrong).text for scene in examples.scenes]
            train_base(pipeline, latents, told, steps=steps, learning_rate=rate, on_checkpoint=_show(out))
        save_base(pipeline, out / "base")


def _show(out: Path):
    """At a checkpoint: log the exact judge's accuracy on training prompts by kind, and keep a sheet of images."""
    from demo.open_world.judge import SceneJudge

    judge = SceneJudge(None, None, torch.device("cpu"))
    train, _ = choose_prompts()
    captions = train[:: len(train) // 72]

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
    """Make the open world."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    make_world(out, QUICK if quick else Effort(), device)


if __name__ == "__main__":
    typer.run(main)
