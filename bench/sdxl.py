"""SDXL at its true size on one GPU: pictures a second, training samples a second, memory, and the share of the roof.

    python -m bench.sdxl [--batch-sizes 1 4 8 16] [--train-batch-sizes 1 4 8] [--steps 30] [--roof-tflops 989]
    python -m bench.sdxl --cpu | --tiny

Makes SDXL 1.0's networks with random weights, saves them in diffusers' layout in a temporary folder (7 GB), and runs
this project's own `Sampler` and stage `train` on them. A row's share is of the operations that the UNet must do: one
pass a step and picture, two when guided, and two passes' worth for LoRA's forward and backward (a checkpoint's
recomputation is not counted, nor are VAE and text encoders), over what a large matrix product reaches on the same
device and over the number of the datasheet. Without CUDA there are `--cpu`, a whole round at 256 x 256 in two steps,
and `--tiny`, the same code on a tiny configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from bench import sdxl_round
from bench.random_sdxl import SDXL, TINY, Configuration, save_pipeline, unet_flops
from srpo.config.loader import PARAMS_FILE, Params, load_params
from srpo.config.schema import SamplingParams
from srpo.data import parquet
from srpo.data.schemas import LATENTS
from srpo.rounds import BASE, Round, RoundFiles
from srpo.runtime.device import pick_device, pick_dtype
from srpo.sampling.sampler import Sampler, sample_images
from srpo.stages.train import train

KEY = "001"
PROJECT = Path(__file__).parent.parent
PROMPT = "a photo of a red circle on a green table"
TRAIN_STEPS, WARM_UP = 8, 3  # steps that count, and those before them


def write_project(root: Path, configuration: Configuration, device: torch.device) -> None:
    """params.yaml, a base of random weights, and 64 winners of random latents."""
    save_pipeline(configuration, device, root / "base")
    lineage = RoundFiles(root, BASE).adapter / "lineage.json"
    lineage.parent.mkdir(parents=True)
    lineage.write_text(json.dumps({"base": {"source": "random weights"}}))
    side, rng = configuration.size // 8, np.random.default_rng(0)
    latents = {"latents": LATENTS, "loser_latents": LATENTS, "latents_shape": pa.list_(pa.int32())}
    fields = {"candidate_id": pa.string(), "prompt": pa.string(), "weight": pa.float32()} | latents
    rows = [
        {"candidate_id": str(i), "prompt": PROMPT, "weight": 1.0, "latents_shape": [4, side, side]}
        | {name: parquet.latents_bytes(rng.normal(size=4 * side * side)) for name in ("latents", "loser_latents")}
        for i in range(64)
    ]
    parquet.write_table(RoundFiles(root, KEY).winners / "shard-00000.parquet", rows, fields)


def read_params(root: Path, size: int, **changes: dict) -> Params:
    """The shipped params.yaml on this base, with some sections' keys changed."""
    raw = YAML(typ="safe").load((PROJECT / PARAMS_FILE).read_text(encoding="utf-8"))
    raw["model"] = {"base": str(root / "base")}
    raw["generate"] |= {"height": size, "width": size}
    for section, keys in changes.items():
        raw[section] |= keys
    (root / PARAMS_FILE).write_text(json.dumps(raw), encoding="utf-8")
    return load_params(root / PARAMS_FILE)


def generation(root: Path, size: int, batches: list[int], steps: int) -> Iterator[tuple[str, float | None, float]]:
    """For every batch size what it is, guided pictures a second (None: out of memory), and GB at peak."""
    sampler = Sampler(read_params(root, size))
    embeds = sampler.encode([PROMPT])
    for batch in batches:
        name, seeds = f"generate, {batch} at once", list(range(batch))
        _reset()
        try:
            for count in (2, steps):  # the first is a warm-up
                sampler.batch_size = batch
                start = _now()
                sampling = SamplingParams(num_inference_steps=count, guidance_scale=5.0, height=size, width=size)
                sample_images(sampler, embeds, [0] * batch, seeds, sampling)
                seconds = _now() - start
        except torch.OutOfMemoryError:
            yield name, None, _peak()
            continue
        # a batch that did not fit was halved on the way
        yield name, batch / seconds if sampler.batch_size == batch else None, _peak()


def training(root: Path, size: int, batches: list[int]) -> Iterator[tuple[str, float | None, float]]:
    """The same for LoRA training, with and without gradient checkpointing: samples a second."""
    for checkpointing in (False, True):
        for batch in batches:
            settings = {"batch_size": batch, "steps": WARM_UP + TRAIN_STEPS}
            runtime = {"gradient_checkpointing": checkpointing, "checkpoint_every": 10**6}
            params = read_params(root, size, train=settings, runtime=runtime)
            ends: list[float] = []
            _reset()
            try:
                train(Round.of(params, root, KEY), lambda metrics, step, ends=ends: ends.append(_now()))
            except torch.OutOfMemoryError:
                ends = []
            speed = TRAIN_STEPS * batch / (ends[-1] - ends[WARM_UP - 1]) if ends else None
            yield f"train LoRA, {batch} at once{', checkpointing' if checkpointing else ''}", speed, _peak()


def matmul_tflops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """What a product of two square matrices reaches: the best of five rounds of ten."""
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = _now()
        for _ in range(10):
            one @ other
        seconds.append(_now() - start)
    return 10 * 2 * side**3 / min(seconds[1:]) / 1e12


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--train-batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--roof-tflops", type=float, default=989, help="dense bf16 of the datasheet; 989: H100, H200")
    parser.add_argument("--cpu", action="store_true", help="every stage on a CPU: bench.sdxl_round --cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny configuration: shows that the code runs")
    arguments = parser.parse_args(argv)
    if arguments.cpu:
        sdxl_round.main(["--cpu"])
        return
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit(
            "bench.sdxl: SDXL at its true size needs a CUDA GPU; --cpu runs every stage at 256 x 256 in two steps,"
            " --tiny the same code on a tiny configuration"
        )
    logging.getLogger("srpo").setLevel(logging.ERROR)
    configuration = TINY if arguments.tiny else SDXL
    each = unet_flops(configuration) / 1e12
    with tempfile.TemporaryDirectory() as folder:
        root, size = Path(folder), configuration.size
        runtime = read_params(root, size).runtime
        device = pick_device(runtime)
        dtype = pick_dtype(runtime, device)
        roof = matmul_tflops(device, dtype, 512 if arguments.tiny else 8192)
        write_project(root, configuration, device)
        found = [(*row, 2 * arguments.steps) for row in generation(root, size, arguments.batch_sizes, arguments.steps)]
        found += [(*row, 2) for row in training(root, size, arguments.train_batch_sizes)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    which = "a tiny configuration, which says nothing of SDXL" if arguments.tiny else "SDXL 1.0"
    table = Table(
        title=f"{which}, {size} x {size}, {arguments.steps} guided steps, {str(dtype)[6:]} on {name}",
        caption=f"UNet pass {each:.4g} TFLOP; a matrix product reaches {roof:.4g} TFLOP/s, the datasheet says "
        f"{arguments.roof_tflops:g}",
    )
    for column in ("what", "a second", "GB at peak", "TFLOP/s", "of the product", "of the datasheet"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, speed, memory, passes in found:
        if speed is None:
            table.add_row(what, "out of memory", f"{memory:.1f}", "", "", "")
            continue
        rate = speed * passes * each
        shares = f"{rate / roof:.1%}", f"{rate / arguments.roof_tflops:.1%}"
        table.add_row(what, f"{speed:.3g}", f"{memory:.1f}", f"{rate:.4g}", *shares)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
