"""Checks of memory, disk and time against this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from srpo.config.loader import Params
from srpo.data.prompts import Prompt
from srpo.preflight import CheckResult, cost, memory
from srpo.preflight.models import find_base_file
from srpo.rounds import BASE, RoundFiles
from srpo.runtime.cpu import is_fast_on_cpu
from srpo.runtime.extras import missing
from srpo.sampling.sizes import rows_by_size

SDXL_BLOCKS = [320, 640, 1280]
LINKS = {"hardlink", "symlink"}


class Device(NamedTuple):
    """A GPU: its name, and its memory in GB."""

    name: str
    memory: float


Prompts = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Train and eval prompts."""


def check_capacity(params: Params, root: Path, prompts: Prompts | None) -> list[CheckResult]:
    """Check number format and processes; for SDXL also memory, disk and time of each round.

    Args:
        prompts: None leaves out what depends on them.
    """
    devices = list_devices()
    results = check_runtime(params, devices)
    config = find_base_file(params, root, "unet/config.json")
    if config and json.loads(config.read_text(encoding="utf-8")).get("block_out_channels") != SDXL_BLOCKS:
        text = "not estimated: the formulas are for SDXL, and this base model has other sizes"
        return [*results, CheckResult("cost", "ok", text)]
    if prompts is None:
        return [*results, CheckResult("cost", "warn", "not estimated: a prompt file is not readable")]
    rounds = {key: params.for_round(key) for key in params.rounds}
    works = {key: _Work.of(own, *prompts) for key, own in rounds.items()}
    links = bool(LINKS & _cache_types(root))
    return [
        *results,
        check_memory(works, devices),
        check_cards(works),
        check_disk(works, root, links),
        *check_time(works, devices, links),
    ]


class _Work(NamedTuple):
    """What a round computes.

    Attributes:
        params: with the round's overrides.
        train: images of train prompts; `held_out` are those of eval prompts.
        pixels: of the largest image.
    """

    params: Params
    train: cost.Images
    held_out: cost.Images
    pixels: float

    @classmethod
    def of(cls, params: Params, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> _Work:
        sizes = [*rows_by_size(train, params.generate), *rows_by_size(held_out, params.evaluate)]
        largest = max((size.width * size.height for size in sizes), default=0)
        images = cost.Images.of
        return cls(params, images(train, params.generate), images(held_out, params.evaluate), largest)


def list_devices() -> list[Device]:
    """Return the GPUs that the driver's tool reports: importing torch takes seconds, and asking it a CUDA context."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [Device(name.strip(), float(mib) * 2**20 / cost.GB) for name, mib in rows if mib.strip().isdigit()]


def check_runtime(params: Params, devices: list[Device]) -> list[CheckResult]:
    """Check `runtime` against this machine; return problems only."""
    runtime = params.runtime
    results = []
    on_cpu = runtime.device == "cpu" or (runtime.device == "auto" and not devices)
    if on_cpu and not is_fast_on_cpu(runtime.dtype):
        text = f"{runtime.dtype} is emulated on this CPU, about a hundred times slower than float32: set float32"
        results.append(CheckResult("runtime.dtype", "warn", text))
    if runtime.cluster and (line := missing("ray")):
        results.append(CheckResult("runtime.cluster", "fail", line))
    if devices and not on_cpu and not runtime.cluster and runtime.processes > len(devices):
        text = f"{runtime.processes}, and this machine has {len(devices)} GPUs: lower it to run here"
        results.append(CheckResult("runtime.processes", "warn", text))
    return results


def check_memory(works: dict[str, _Work], devices: list[Device]) -> CheckResult:
    """Compare the memory that sampling and training need with the first GPU's."""
    needs = {
        "sampling": max(memory.sampling_gb(work.params, work.pixels) for work in works.values()),
        "training": max(memory.training_gb(work.params, work.pixels) for work in works.values()),
    }
    text = ", ".join(f"{name} {need:.0f} GB" for name, need in needs.items()) + " (estimates, a quarter either way)"
    if not devices:
        return CheckResult("memory", "warn", f"{text}; no GPU on this machine to compare with")
    device = devices[0]
    text = f"{text}; {device.name} has {device.memory:.0f} GB"
    for stage, need in needs.items():
        if need > device.memory:
            return CheckResult("memory", "warn", f"{text}, too little for {stage}: see `memory by GPU`")
    return CheckResult("memory", "ok", text)


def check_cards(works: dict[str, _Work]) -> CheckResult:
    """Say with which keys the round that needs most fits into GPUs of several sizes."""
    largest = max(works.values(), key=lambda work: memory.training_gb(work.params, work.pixels))
    found = []
    for size in memory.CARDS:
        keys = memory.fitting_keys(largest.params, size, largest.pixels)
        found.append(f"{size} GB: {_listed(keys) if keys else 'does not fit'}")
    return CheckResult("memory by GPU", "ok", f"{'; '.join(found)} (computed)")


def _listed(keys: memory.Keys) -> str:
    """Return keys with their values; those that are off are left out."""
    names = {"fp8": "model.fp8"}
    return ", ".join(
        f"{names.get(name, name)} {str(value).lower()}" for name, value in keys.items() if value is not False
    )


def check_disk(works: dict[str, _Work], root: Path, links: bool) -> CheckResult:
    """Compare the size of the rounds that are not done yet with free disk space."""
    remaining = [work for key, work in works.items() if not RoundFiles(root, key).evaluation.exists()]
    copies = 1 if links else 2
    needed = copies * sum(cost.round_bytes(work.params, work.train, work.held_out) for work in remaining) / cost.GB
    free = shutil.disk_usage(root).free / cost.GB
    cache = "" if links else ", with a copy of each file in DVC's cache"
    text = f"{needed:.0f} GB for {len(remaining)} remaining rounds{cache} (images of 1.4 MB), {free:.0f} GB free"
    if needed <= free:
        return CheckResult("disk", "ok", text)
    hint = "" if links else "; `dvc config cache.type hardlink,symlink` avoids the copies"
    return CheckResult("disk", "fail", f"{text}: free space or lower generate.candidates_per_prompt{hint}")


def check_time(works: dict[str, _Work], devices: list[Device], links: bool) -> list[CheckResult]:
    """Estimate hours of base and of each round, on this machine's GPU or on examples."""
    known = bool(devices) and cost.peak_tflops(devices[0].name) is not None
    names = [devices[0].name] if known else list(cost.EXAMPLES)
    cores = os.cpu_count() or 1
    results: list[CheckResult] = []
    for key, work in works.items():
        processes = work.params.runtime.processes
        machines = {name: cost.Machine(cost.peak_tflops(name) or 1.0, processes, cores) for name in names}
        if not results:
            evaluation = cost.evaluation_cost(work.params, work.held_out)
            by_name = {name: evaluation.hours(machine) for name, machine in machines.items()}
            hours = ", ".join(f"{name} {value:.1f}" for name, value in by_name.items())
            results.append(CheckResult(f"round {BASE}", "ok", f"hours of evaluation: {hours}"))
        whole = cost.round_cost(work.params, work.train, work.held_out, copies=1 if links else 2)
        results.append(CheckResult(f"round {key}", "ok", _describe(whole, machines)))
    return results


def _describe(work: cost.RoundCost, machines: dict[str, cost.Machine]) -> str:
    by_stage = {name: work.stage_hours(machine) for name, machine in machines.items()}
    totals = ", ".join(f"{name} {sum(hours.values()):.1f}" for name, hours in by_stage.items())
    name, machine = next(iter(machines.items()))
    stages = ", ".join(f"{stage} {hours:.1f}" for stage, hours in by_stage[name].items())
    processes = f"{machine.processes} process{'es' if machine.processes > 1 else ''}"
    return (
        f"hours in {processes} with {machine.cores} CPU cores, at {machine.share:.0%} of the bf16 peak, assumed:"
        f" {totals} ({name}: {stages}; {work.gpu_hours(machine):.1f} GPU-hours)"
    )


def _cache_types(root: Path) -> set[str]:
    if missing("dvc"):
        return set()
    from dvc.config import Config, ConfigError

    try:
        return set(Config(str(root / ".dvc"))["cache"].get("type") or [])
    except (ConfigError, KeyError, OSError):
        return set()
