"""A whole round of `presets/sdxl.yaml` at SDXL's true size with random weights, stage by stage.

    python -m bench.sdxl_round [--prompts 4] [--candidates 4] [--steps 30] [--train-steps 3] [--compile]
    python -m bench.sdxl_round --cpu     every stage at 256 x 256 in two steps
    python -m bench.sdxl_round --tiny    the same code on tiny networks

Every stage is a command of `srpo` in a process of its own, imports and loading of the models included, so its seconds
at a few prompts are mostly constant. The reward models are those of the preset in their true layouts; features come
from the judge `clip`, because InceptionV3's weights can't be made. On a CPU `pick` and `hps` are tiny: in float32 the
UNet has 10 GB, and the true ones would need another 8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from bench.measured import Usage, measured
from bench.random_rewards import CLIP_H, CLIP_L, save_clip, save_hps
from bench.random_rewards import TINY as TINY_CLIP
from bench.random_sdxl import SDXL, TINY, save_pipeline
from srpo.config.loader import PARAMS_FILE, load_params
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE
from srpo.preflight.memory import training_gb
from srpo.rounds import BASE
from srpo.storage.json_files import read_json, write_json

KEY = "001"
PROJECT = Path(__file__).parent.parent
EVAL_PROMPTS, REFERENCES = 3, 16
STAGES = (
    ["base"],
    ["generate", KEY],
    ["score", KEY],
    ["select", KEY],
    ["train", KEY],
    ["evaluate", BASE],
    ["evaluate", KEY],
    ["gate", KEY],
    ["report", KEY],
)


@dataclass
class DeviceMemory:
    """The peak of a CUDA device's memory in GB, of all processes, without what was in use before."""

    peak: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample the memory in use inside a `with` block, twenty times a second."""
        if not torch.cuda.is_available():
            yield
            return
        free = torch.cuda.mem_get_info()[0]

        def sample() -> None:
            while not self._stop.wait(0.05):
                self.peak = max(self.peak, (free - torch.cuda.mem_get_info()[0]) / 1e9)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def make_project(root: Path, arguments: argparse.Namespace) -> None:
    """Write the models, params.yaml, prompts and a reference set."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    save_pipeline(TINY if arguments.tiny else SDXL, device, root / "base")
    vae = root / "base" / "vae" / "config.json"  # as the preset's VAE, which computes in 16 bits
    write_json(vae, read_json(vae) | {"force_upcast": False})
    large = TINY_CLIP if arguments.tiny or arguments.cpu else CLIP_H
    save_clip(large, device, root / "pick")
    save_hps(large, device, root / "hps")
    save_clip(TINY_CLIP if arguments.tiny else CLIP_L, device, root / "clip")
    for name, count in (("train", arguments.prompts), ("eval", EVAL_PROMPTS)):
        lines = [json.dumps({"id": f"{name}-{i}", "prompt": f"a {name} image, number {i}"}) for i in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (REFERENCES, arguments.size, arguments.size, 3), dtype=np.uint8)
    rows = [{"image": encode_image(pixels)} for pixels in images]
    parquet.write_table(root / "reference" / "images.parquet", rows, {"image": IMAGE})
    (root / PARAMS_FILE).write_text(json.dumps(params(arguments)), encoding="utf-8")
    shutil.copy(PROJECT / "dvc.yaml", root)


def params(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the preset with local models, few prompts and few steps."""
    raw: dict[str, Any] = YAML(typ="safe").load((PROJECT / "presets" / "sdxl.yaml").read_text(encoding="utf-8"))
    size = {"height": arguments.size, "width": arguments.size, "num_inference_steps": arguments.steps}
    raw["rounds"] = {KEY: {"parent": BASE, "generate": {}, "select": {}, "train": {}}}
    raw["model"] = {"base": "base"}
    raw["prompts"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    raw["generate"] |= size | {"candidates_per_prompt": arguments.candidates}
    for name, spec in raw["rewards"].items():
        spec["model"] = name
    raw["train"] |= {"steps": arguments.train_steps, "batch_size": arguments.train_batch, "warmup_steps": 1}
    raw["evaluate"] |= size | {"reference": "reference", "features": "clip", "samples": EVAL_PROMPTS}
    raw["runtime"] |= {"compile": arguments.compile, "device": "cpu" if arguments.cpu else "auto"}
    if arguments.cpu:
        raw["evaluate"]["guidance_scales"] = [raw["evaluate"]["guidance_scale"]]
        raw["runtime"] |= {"train_batch_size": 1}
    raw["tracking"]["uri"] = "sqlite:///mlflow.db"
    return raw


def images_of(stage: list[str], arguments: argparse.Namespace) -> int:
    """Return the number of images that a stage makes or scores, 0 for the others."""
    if stage[0] in ("generate", "score"):
        return arguments.prompts * arguments.candidates
    raw = params(arguments)["evaluate"]
    return len(raw["guidance_scales"]) * EVAL_PROMPTS * raw["images_per_prompt"] if stage[0] == "evaluate" else 0


def output_mb(root: Path) -> float:
    """Return MB of the files in `rounds/`."""
    return sum(file.stat().st_size for file in (root / "rounds").rglob("*") if file.is_file()) / 1e6


def run(root: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, Usage, float, float, float]]:
    """Run all stages; for each yield its name, what it used, GB of device memory, images a second, MB of outputs."""
    for stage in STAGES:
        before = output_mb(root)
        memory = DeviceMemory()
        with memory.watched():
            usage = measured(["srpo", *stage], root)
        images = images_of(stage, arguments)
        print(f"{' '.join(stage)}: {usage.wall:.1f} s", flush=True)
        yield " ".join(stage), usage, memory.peak, images / usage.wall, output_mb(root) - before


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, help="train prompts; 4, or 2 on a CPU")
    parser.add_argument("--candidates", type=int, help="4, or 2 on a CPU")
    parser.add_argument("--size", type=int, help="of images; 1024, or 256 on a CPU, or 64 for --tiny")
    parser.add_argument("--steps", type=int, help="denoising steps; 30, or 2 on a CPU and for --tiny")
    parser.add_argument("--train-steps", type=int, help="3, or 2 on a CPU")
    parser.add_argument("--train-batch", type=int, help="8, or 4 on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    small = arguments.cpu or arguments.tiny or not torch.cuda.is_available()
    arguments.size = arguments.size or (64 if arguments.tiny else 256 if small else 1024)
    arguments.steps = arguments.steps or (2 if small else 30)
    arguments.prompts = arguments.prompts or (2 if arguments.cpu else 4)
    arguments.candidates = arguments.candidates or (2 if arguments.cpu else 4)
    arguments.train_steps = arguments.train_steps or (2 if arguments.cpu else 3)
    arguments.train_batch = arguments.train_batch or (4 if arguments.cpu else 8)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        start = time.perf_counter()
        child = get_context("spawn").Process(target=make_project, args=(root, arguments))
        child.start()  # of its own: what made the weights keeps their memory
        child.join()
        if child.exitcode:
            raise SystemExit("bench.sdxl_round: could not make the models")
        print(f"models made in {time.perf_counter() - start:.1f} s", flush=True)
        found = list(run(root, arguments))
        estimate = training_gb(load_params(root / PARAMS_FILE).for_round(KEY))
    device = "CPU" if arguments.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    table = Table(
        title=f"{'tiny networks' if arguments.tiny else 'SDXL 1.0'}, random weights, {arguments.size} x"
        f" {arguments.size}, {arguments.steps} steps, {arguments.prompts} x {arguments.candidates} candidates, {device}"
    )
    columns = (
        "stage",
        "seconds",
        "CPU seconds",
        "GB at peak",
        "GB without files",
        "GB of device",
        "images a second",
        "MB read",
        "MB written",
    )
    for column in (*columns, "MB of outputs"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, usage, memory, speed, outputs in found:
        table.add_row(
            *(stage, f"{usage.wall:.1f}", f"{usage.cpu:.1f}", f"{usage.memory:.1f}"),
            *(f"{usage.anonymous:.1f}", f"{memory:.1f}" if memory else ""),
            *(f"{speed:.2f}" if speed else "", f"{usage.read:.0f}", f"{usage.written:.0f}", f"{outputs:.1f}"),
        )
    Console(width=140).print(table)
    print(f"in all {sum(usage.wall for _, usage, *_ in found):.0f} s")
    if not arguments.tiny:
        (train,) = (memory or usage.anonymous for stage, usage, memory, *_ in found if stage.startswith("train"))
        print(f"train: {train:.1f} GB at peak; srpo check estimates {estimate:.1f}")


if __name__ == "__main__":
    main()
