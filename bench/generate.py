"""Making candidates: the stage `generate` against the loop a user would write around diffusers' pipeline.

    python -m bench.generate [--prompts 35] [--repeats 3]

Run it in the project's folder; it uses params.yaml's model and generate settings. Both load the model, sample the same
number of images of the same prompts, and write them to disk (parquet with latents, and PNG files). The table gives
the best of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.prompts import cut_prompts
from srpo.config.loader import Params, load_params
from srpo.data.prompts import load_prompts
from srpo.models.pipeline import load_pipeline
from srpo.rounds import BASE, Round, RoundFiles
from srpo.runtime.device import pick_device, pick_dtype
from srpo.stages.generate import generate


def by_hand(params: Params, root: Path) -> None:
    """Prompt after prompt through `StableDiffusionXLPipeline`, each image a PNG file."""
    settings, device = params.generate, pick_device(params.runtime)
    pipeline = load_pipeline(params.model, pick_dtype(params.runtime, device)).to(device)
    for prompt in load_prompts(root / params.prompts.train):
        images = pipeline(
            prompt.prompt,
            num_images_per_prompt=settings.candidates_per_prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            generator=torch.Generator().manual_seed(params.seed),
        ).images
        for index, image in enumerate(images):
            image.save(root / f"{prompt.id}-{index}.png")


def by_srpo(params: Params, root: Path) -> None:
    """The stage itself, from the start."""
    key = next(iter(params.rounds))
    shutil.rmtree(RoundFiles(root, key).folder, ignore_errors=True)
    generate(Round.of(params, root, key))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=35)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("srpo").setLevel(logging.ERROR)
    params, project = load_params(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in (params.prompts.train, params.prompts.eval):
            cut_prompts(project / path, root / path, arguments.prompts)
        adapter = RoundFiles(root, BASE).adapter  # of base: no weights
        adapter.mkdir(parents=True)
        (adapter / "lineage.json").write_text("{}")
        seconds: dict[str, list[float]] = {"StableDiffusionXLPipeline, prompt by prompt": [], "srpo generate": []}
        for _ in range(arguments.repeats):
            for name, way in zip(seconds, (by_hand, by_srpo), strict=True):
                start = time.perf_counter()
                way(params, root)
                seconds[name].append(time.perf_counter() - start)
    count = arguments.prompts * params.generate.candidates_per_prompt
    first = min(next(iter(seconds.values())))
    device = pick_device(params.runtime).type
    table = Table(title=f"{count} candidates, {params.generate.num_inference_steps} steps, on {device}")
    for column in ("way", "seconds", "images/s", "times as fast"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, found in seconds.items():
        table.add_row(name, f"{min(found):.2f}", f"{count / min(found):.1f}", f"{first / min(found):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
