"""Checks of memory, disk and time against this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from srpo.config.loader import Params
from srpo.preflight import CheckResult, cost
from srpo.preflight.models import find_base_file
from srpo.rounds import BASE, RoundFiles
from srpo.runtime.cpu import is_fast_on_cpu
from srpo.runtime.extras import missing

SDXL_BLOCKS = [320, 640, 1280]
LINKS = {"hardlink", "symlink"}


class Device(NamedTuple):
    """A GPU: its name, and its memory in GB."""

    name: str
    memory: float


def check_capacity(params: Params, root: Path, prompt_counts: tuple[int, int] | None) -> list[CheckResult]:
    """Check number format and processes; for SDXL also memory, disk and time of each round.

    Args:
        prompt_counts: numbers of train and eval prompts; None leaves out what depends on them.
    """
    devices = list_devices()
    results = check_runtime(params, devices)
    config = find_base_file(params, root, "unet/config.json")
    if config and json.loads(config.read_text(encoding="utf-8")).get("block_out_channels") != SDXL_BLOCKS:
        text = "not estimated: the formulas are for SDXL, and this base model has other sizes"
        return [*results, CheckResult("cost", "ok", text)]
    if prompt_counts is None:
        return [*results, CheckResult("cost", "warn", "not estimated: a prompt file is not readable")]
    rounds = {key: params.for_round(key) for key in params.rounds}
    links = bool(LINKS & _cache_types(root))
    return [
        *results,
        check_memory(rounds, devices),
        check_cards(rounds),
        check_disk(rounds, root, prompt_counts, links),
        *check_time(rounds, devices, prompt_counts, links),
    ]


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


def check_memory(rounds: dict[str, Params], devices: list[Device]) -> CheckResult:
    """Compare the memory that sampling and training need with the first GPU's."""
    needs = {
        "sampling": max(cost.sampling_gb(params) for params in rounds.values()),
        "training": max(cost.training_gb(params) for params in rounds.values()),
    }
    text = ", ".join(f"{name} {need:.0f} GB" for name, need in needs.items()) + " (estimates, a quarter either way)"
    if not devices:
        return CheckResult("memory", "warn", f"{text}; no GPU on this machine to compare with")
    device = devices[0]
    text = f"{text}; {device.name} has {device.memory:.0f} GB"
    for stage, need in needs.items():
        if need > device.memory:
            key = "batch_size" if stage == "sampling" else "train_batch_size, or set gradient_checkpointing"
            return CheckResult("memory", "warn", f"{text}: lower runtime.{key}")
    return CheckResult("memory", "ok", text)


def check_cards(rounds: dict[str, Params]) -> CheckResult:
    """Say with which keys of `runtime` the round that needs most fits into GPUs of several sizes."""
    largest = max(rounds.values(), key=cost.training_gb)
    found = []
    for size in cost.CARDS:
        keys = cost.fitting_keys(largest, size)
        values = ", ".join(f"{name} {str(value).lower()}" for name, value in (keys or {}).items())
        found.append(f"{size} GB: {values or 'does not fit'}")
    return CheckResult("memory by GPU", "ok", f"{'; '.join(found)} (computed)")


def check_disk(rounds: dict[str, Params], root: Path, prompt_counts: tuple[int, int], links: bool) -> CheckResult:
    """Compare the size of the rounds that are not done yet with free disk space."""
    remaining = {key: params for key, params in rounds.items() if not RoundFiles(root, key).evaluation.exists()}
    copies = 1 if links else 2
    needed = copies * sum(cost.round_bytes(params, *prompt_counts) for params in remaining.values()) / cost.GB
    free = shutil.disk_usage(root).free / cost.GB
    cache = "" if links else ", with a copy of each file in DVC's cache"
    text = f"{needed:.0f} GB for {len(remaining)} remaining rounds{cache} (images of 1.4 MB), {free:.0f} GB free"
    if needed <= free:
        return CheckResult("disk", "ok", text)
    hint = "" if links else "; `dvc config cache.type hardlink,symlink` avoids the copies"
    return CheckResult("disk", "fail", f"{text}: free space or lower generate.candidates_per_prompt{hint}")


def check_time(
    rounds: dict[str, Params], devices: list[Device], prompt_counts: tuple[int, int], links: bool
) -> list[CheckResult]:
    """Estimate hours of base and of each round, on this machine's GPU or on examples."""
    known = bool(devices) and cost.peak_tflops(devices[0].name) is not None
    names = [devices[0].name] if known else list(cost.EXAMPLES)
    cores = os.cpu_count() or 1
    results: list[CheckResult] = []
    for key, params in rounds.items():
        processes = params.runtime.processes
        machines = {name: cost.Machine(cost.peak_tflops(name) or 1.0, processes, cores) for name in names}
        if not results:
            evaluation = cost.evaluation_cost(params, prompt_counts[1])
            by_name = {name: evaluation.hours(machine) for name, machine in machines.items()}
            hours = ", ".join(f"{name} {value:.1f}" for name, value in by_name.items())
            results.append(CheckResult(f"round {BASE}", "ok", f"hours of evaluation: {hours}"))
        work = cost.round_cost(params, *prompt_counts, copies=1 if links else 2)
        results.append(CheckResult(f"round {key}", "ok", _describe(work, machines)))
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
