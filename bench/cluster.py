"""A cluster by simulation: units that sleep as long as a GPU would compute, and what dealing them out costs the driver.

    python -m bench.cluster [--workers 1 2 4 8 16 32 64] [--seconds 4] [--megabytes 64] [--plot docs/images/cluster.png]

Measured: a Ray cluster of a head and a node on loopback, whose CPUs are a number only. Every worker is a real process,
a real actor of `srpo.runtime.cluster`, whose unit's bytes go from the node's object store to the head's and are written
by the driver. Workers begin together. Efficiency is a unit's seconds over those until its worker begins the next one.
CPU seconds are those of the driver, and of Ray on the driver's host (GCS and raylet), in the same window.

Computed: more workers than this machine holds, from a queue with one server, the driver, which takes the measured CPU
seconds per unit, and per unit and worker for waiting for many at once.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench.measured import PROJECT
from srpo.config.loader import PARAMS_FILE, load_params
from srpo.rounds import Round
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Units

NODE = {"include_dashboard": False, "object_store_memory": 10**9, "node_ip_address": "127.0.0.2"}
UNITS_PER_WORKER = 6
SMALL = 0.001  # MB
SDXL_UNIT_SECONDS = 187.0  # 28 prompts x 8 images at 1.2 images/s, the presets' shard on an H200
SDXL_UNIT_MEGABYTES = 380.0  # 224 images of 1.5 MB and latents
COMPUTED_WORKERS = [2**power for power in range(13)]


class Measured(NamedTuple):
    """A number of workers: their efficiency, and CPU seconds per unit of the driver and of Ray on its host."""

    workers: int
    efficiency: float
    driver: float
    ray: float


@contextmanager
def sleeping(seconds: float, megabytes: float, workers: int, times: Path, round: Round) -> Iterator[Callable]:
    """Load nothing; a unit sleeps and writes this much. The first one of each worker waits for all workers."""
    content = np.random.default_rng(0).integers(0, 256, int(megabytes * 1e6), np.uint8)
    (times / str(os.getpid())).touch()
    while len(os.listdir(times)) < workers:  # noqa: PTH208
        time.sleep(0.1)

    def make(unit: Path) -> None:
        begun = time.time()
        time.sleep(seconds * random.Random(unit.name).uniform(0.5, 1.5))  # else all would end at once
        content.tofile(unit)
        with (times / str(os.getpid())).open("a") as file:
            file.write(f"{begun} {time.time()}\n")

    yield make


def measure(cluster: Any, root: Path, workers: int, seconds: float, megabytes: float) -> Measured:
    """Run UNITS_PER_WORKER units and one more per worker, on a node of its own."""
    node = cluster.add_node(num_cpus=workers, **NODE)
    params = load_params(PROJECT / PARAMS_FILE)
    params = params.model_copy(update={"runtime": params.runtime.model_copy(update={"cluster": cluster.address})})
    head = [psutil.Process(each.process.pid) for name in ("gcs_server", "raylet")
            for each in cluster.head_node.all_processes[name]]  # fmt: skip
    spent: list[tuple[float, float]] = []

    def on_deal(_unit: Path) -> list[Path]:
        spent.append((time.process_time(), sum(sum(process.cpu_times()[:2]) for process in head)))
        return []

    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        units, times = folder / "units", folder / "times"
        units.mkdir()
        times.mkdir()
        paths = [units / f"unit-{number}" for number in range((UNITS_PER_WORKER + 1) * workers)]
        load = partial(sleeping, seconds, megabytes, workers, times)
        make_units(Units(Round("bench", params, folder), "bench", paths, load, inputs_of=on_deal))
        rows = [[tuple(map(float, line.split())) for line in file.read_text().splitlines()] for file in times.iterdir()]
    cluster.remove_node(node)
    slept = sum(end - begun for row in rows for begun, end in row[1:-1])
    taken = sum(row[-1][0] - row[1][0] for row in rows)
    (driver, ray), (last_driver, last_ray) = spent[workers], spent[-1]  # from the first unit dealt to one that works
    count = len(spent) - workers - 1
    return Measured(workers, slept / taken, (last_driver - driver) / count, (last_ray - ray) / count)


def cost_of_waiting(cluster: Any, workers: int, calls: int = 200) -> float:
    """Return the CPU seconds in which the driver finds the one result of this many that is there."""
    import ray

    ray.init(cluster.address, log_to_driver=False)
    try:
        task = ray.remote(num_gpus=1)(waited_for)  # there is no GPU: never ready
        results = [*(task.remote() for _ in range(workers - 1)), ray.put(0)]
        before = time.process_time()
        for _ in range(calls):
            ray.wait(results, timeout=1, fetch_local=False)
        return (time.process_time() - before) / calls
    finally:
        ray.shutdown()


def waited_for() -> None:
    """Do nothing."""


def computed_efficiency(workers: int, seconds: float, cost: float) -> float:
    """Return the share of time that workers compute, if a driver takes `cost` seconds to give each its next unit."""
    chance = random.Random(0)
    ends = [chance.uniform(0, seconds) for _ in range(workers)]
    heapq.heapify(ends)
    free, computed, waited = 0.0, 0.0, 0.0
    for _ in range(50 * workers):
        end = heapq.heappop(ends)
        free = max(free, end) + cost
        length = seconds * chance.uniform(0.5, 1.5)
        waited += free - end
        computed += length
        heapq.heappush(ends, free + length)
    return computed / (computed + waited)


def main() -> None:
    """Measure, and print a table and the arithmetic for 1,000 GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    table = Table("workers", "MB/unit", "efficiency", "driver CPU ms/unit", "Ray CPU ms/unit on its host")
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"XDG_CACHE_HOME": name, "PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
        run = partial(measure, cluster, Path(name))
        small = [run(workers, arguments.seconds, SMALL) for workers in arguments.workers]
        large = run(4, arguments.seconds, arguments.megabytes)
        for megabytes, row in [*((SMALL, row) for row in small), (arguments.megabytes, large)]:
            milliseconds = (f"{1000 * value:.1f}" for value in (row.driver, row.ray))
            table.add_row(str(row.workers), f"{megabytes:g}", f"{row.efficiency:.1%}", *milliseconds)
        waiting = {workers: cost_of_waiting(cluster, workers) for workers in (10, 100, 1000)}
        cluster.shutdown()
    Console().print(table)
    print("driver CPU ms to wait for one of", {key: round(1000 * value, 2) for key, value in waiting.items()})
    per_worker = (waiting[1000] - waiting[10]) / 990
    base = small[-1].driver - per_worker * small[-1].workers
    at_four = next((row for row in small if row.workers == 4), small[-1])
    per_megabyte = (large.driver - at_four.driver) / arguments.megabytes
    costs = {
        "units of 4 s": (arguments.seconds, base),
        "SDXL, shared disk": (SDXL_UNIT_SECONDS, base),
        "SDXL, through the driver": (SDXL_UNIT_SECONDS, base + per_megabyte * SDXL_UNIT_MEGABYTES),
    }
    for label, (seconds, cost) in costs.items():
        print(
            f"{label}: {cost + 1000 * per_worker:.4f} driver CPU s per unit of {seconds:g} s at 1,000 workers, of which"
            f" {per_worker * 1000:.4f} to wait; efficiency at 1,000 workers"
            f" {computed_efficiency(1000, seconds, cost + 1000 * per_worker):.1%}"
        )
    rate = 1000 / SDXL_UNIT_SECONDS
    print(f"1,000 GPUs finish {rate:.1f} SDXL units/s, {rate * SDXL_UNIT_MEGABYTES / 1000:.1f} GB/s")
    if arguments.plot:
        plot(small, costs, per_worker, arguments.plot)


def plot(small: Sequence[Measured], costs: dict[str, tuple[float, float]], per_worker: float, path: Path) -> None:
    """Draw efficiency over workers: measured as dots, computed as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, (seconds, cost) in costs.items():
        values = [computed_efficiency(n, seconds, cost + n * per_worker) for n in COMPUTED_WORKERS]
        axes.plot(COMPUTED_WORKERS, values, label=f"computed: {label}")
    axes.plot([row.workers for row in small], [row.efficiency for row in small], "ok", label="measured: units of 4 s")
    axes.set(xlabel="workers", ylabel="share of time in which workers compute", ylim=(0, 1.05))
    axes.set_xscale("log", base=2)
    axes.set_xticks(COMPUTED_WORKERS[::2], [f"{workers:,}" for workers in COMPUTED_WORKERS[::2]])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
