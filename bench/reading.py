"""How fast training reads winners of SDXL's size, against a parquet file of lists read through Python.

    python -m bench.reading [--prompts 60]

Makes a round of synthetic candidates and selects winners and losers. Reads the pairs of latents in order and in random
batches, as training does, and the same pairs from a file whose latents are lists of float16. Prints CPU milliseconds
for each pair, three times.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.true_size import KEY, PAIR, make_project, paired_rows, read_pairs
from srpo.data.parquet import RowReader
from srpo.rounds import RoundFiles

BATCH = 8
EPOCHS = 10


def write_lists(reader: RowReader, paired: np.ndarray, path: Path) -> None:
    """Write the latents of these pairs as lists of float16."""
    columns = {}
    for name in PAIR:
        rows = np.concatenate([reader.latents(paired[i : i + BATCH], name) for i in range(0, len(paired), BATCH)])
        columns[name] = pa.array(list(rows.reshape(len(rows), -1)), type=pa.list_(pa.float16()))
    pq.write_table(pa.table(columns), path, row_group_size=BATCH)


def read_lists(path: Path) -> None:
    """Read all pairs in order, a batch at a time."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH):
        for column in PAIR:
            np.array(batch[column].to_pylist(), dtype=np.float16)


def milliseconds(action: Callable[[], None], pairs: int) -> float:
    """Return CPU milliseconds for each pair."""
    start = time.process_time()
    action()
    return 1e3 * (time.process_time() - start) / pairs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=60)
    prompts = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_project(root, prompts, per_prompt=8)
        for stage in ("score", "select"):
            subprocess.run(["srpo", stage, KEY], cwd=root, check=True, capture_output=True)
        winners, lists = RoundFiles(root, KEY).winners, root / "lists.parquet"
        reader = RowReader(winners)
        paired = paired_rows(reader)
        write_lists(reader, paired, lists)
        print("CPU ms a pair: in order, in random batches, through Python lists")
        for seed in range(3):
            rng = np.random.default_rng(seed)
            shuffled = np.concatenate([rng.permutation(paired) for _ in range(EPOCHS)])
            in_order = milliseconds(lambda: read_pairs(RowReader(winners), paired, BATCH), len(paired))
            at_random = milliseconds(lambda order=shuffled: read_pairs(RowReader(winners), order, BATCH), len(shuffled))
            slow = milliseconds(lambda: read_lists(lists), len(paired))
            print(f"{in_order:.2f} {at_random:.2f} {slow:.1f}: {slow / in_order:.0f} and {slow / at_random:.0f} times")


if __name__ == "__main__":
    main()
