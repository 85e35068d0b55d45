"""A cluster by simulation: units that sleep as long as a GPU would compute, and what dealing them out costs the driver.

    python -m bench.cluster [--workers 1 2 4 8] [--seconds 4] [--megabytes 0.001 64] [--plot docs/images/cluster.png]

A Ray cluster of one head and one node on loopback, whose CPUs are a number only: every worker is a real process, a real
actor of `srpo.runtime.cluster`, and sends its unit's bytes through the object store to the driver, which writes them.
Efficiency is the time that the sleeps would take on that many workers, over the time from the first unit to the last.
Driver's CPU seconds per unit give the number of workers that it can keep busy, for units of any length.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.measured import PROJECT
from srpo.config.loader import PARAMS_FILE, load_params
from srpo.rounds import Round
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Units

ADDRESS = "127.0.0.2"
SDXL_UNIT_SECONDS = 187.0  # 28 prompts x 8 images at 1.2 images/s, the presets' shard on an H200
SDXL_UNIT_MEGABYTES = 380.0  # 224 images of 1.5 MB and latents


@contextmanager
def sleeping(seconds: float, megabytes: float, started: Path, round: Round) -> Iterator[Callable[[Path], None]]:
    """Load nothing; a unit sleeps and writes this much."""
    content = np.random.default_rng(0).integers(0, 256, int(megabytes * 1e6), np.uint8)

    def make(unit: Path) -> None:
        (started / unit.name).write_text(str(time.time()))
        time.sleep(seconds)
        content.tofile(unit)

    yield make


def measure(address: str, root: Path, workers: int, seconds: float, megabytes: float) -> tuple[float, float]:
    """Run 6 units per worker; return the seconds from the first unit's start to the end, and driver's CPU seconds."""
    params = load_params(PROJECT / PARAMS_FILE)
    params = params.model_copy(update={"runtime": params.runtime.model_copy(update={"cluster": address})})
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        units, started = folder / "units", folder / "started"
        units.mkdir()
        started.mkdir()
        paths = [units / f"unit-{number}" for number in range(6 * workers)]
        load = partial(sleeping, seconds, megabytes, started)
        before = time.process_time()
        make_units(Units(Round("bench", params, folder), "bench", paths, load))
        cpu, end = time.process_time() - before, time.time()
        return end - min(float(file.read_text()) for file in started.iterdir()), cpu


def main() -> None:
    """Measure, and print a table and the arithmetic for 1,000 GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.001, 64])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    table = Table("workers", "MB/unit", "units", "seconds", "efficiency", "driver CPU s/unit")
    found: dict[float, list[tuple[int, float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"XDG_CACHE_HOME": name, "PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}
        for workers in arguments.workers:
            options = {"include_dashboard": False, "object_store_memory": 10**9, "node_ip_address": ADDRESS}
            cluster = Cluster(initialize_head=True, head_node_args=options | {"num_cpus": 0})
            cluster.add_node(num_cpus=workers, **options)
            for megabytes in arguments.megabytes:
                wall, cpu = measure(cluster.address, Path(name), workers, arguments.seconds, megabytes)
                efficiency, per_unit = 6 * arguments.seconds / wall, cpu / (6 * workers)
                found.setdefault(megabytes, []).append((workers, efficiency, per_unit))
                values = (workers, megabytes, 6 * workers, f"{wall:.1f}", f"{efficiency:.0%}", f"{per_unit:.4f}")
                table.add_row(*map(str, values))
            cluster.shutdown()
    Console().print(table)
    small, large = (found[size][-1][2] for size in (min(found), max(found)))
    per_mb = (large - small) / max(1e-9, max(found) - min(found))
    for label, cost in (("shared", small), ("copy", small + per_mb * SDXL_UNIT_MEGABYTES)):
        print(
            f"cluster_storage {label}: {cost:.2f} driver CPU s per SDXL unit of {SDXL_UNIT_SECONDS:.0f} s:"
            f" one core keeps {SDXL_UNIT_SECONDS / cost:,.0f} GPUs busy; 1,000 GPUs finish"
            f" {1000 / SDXL_UNIT_SECONDS:.1f} units/s, {1000 / SDXL_UNIT_SECONDS * SDXL_UNIT_MEGABYTES / 1e3:.1f} GB/s"
        )
    if arguments.plot:
        plot(found, arguments.plot)


def plot(found: dict[float, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw efficiency over workers, a line per size of units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for megabytes, rows in found.items():
        axes.plot([row[0] for row in rows], [row[1] for row in rows], "o-", label=f"{megabytes:g} MB per unit")
    axes.set(xlabel="workers", ylabel="efficiency", xscale="log", ylim=(0, 1.05))
    axes.set_xticks([row[0] for row in rows], [str(row[0]) for row in rows])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
