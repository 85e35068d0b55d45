"""Batch-invariant execution on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

LARGE_WEIGHTS = 30e6


def tile_rows(network: torch.nn.Module, rows: int) -> int:
    """Return the number of rows that a network sees at once on a CPU: `rows`, or 1 for a large network.

    Small networks need many rows to keep the cores busy. A large one does not, and padding a tile of 64 rows would make
    a single row of SDXL's UNet twenty times as slow.
    """
    return rows if sum(weight.numel() for weight in network.parameters()) < LARGE_WEIGHTS else 1


class BatchInvariant:
    """Runs networks so that a row's result does not depend on the rows beside it. Holds on a CPU only.

    CPU kernels choose their order of summation by the tensors' shapes, so a network always sees tiles of one fixed
    number of rows (`tile_rows`). Several tiles run side by side, each on its share of the cores: small networks gain
    more from cores of their own than from sharing all of them. Tiles of one row, of large networks, run one by one.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="srpo-tile")

    def run(self, rows: int, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Return the function's result [n, ...] for tensors [n, ...].

        Args:
            rows: rows of a tile; the last tile is filled up with copies of its last row.
            function: maps tensors [rows, ...] to a tensor [rows, ...], row by row; called in inference mode.
        """
        tiles = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
        if rows == 1 or len(tiles) == 1 or self._threads == 1:
            return torch.cat([_run_padded(rows, function, tile) for tile in tiles])
        threads = max(1, self._threads // len(tiles))

        def run_on_own_threads(tile: tuple[torch.Tensor, ...]) -> torch.Tensor:
            torch.set_num_threads(threads)  # of this thread alone
            return _run_padded(rows, function, tile)

        return torch.cat(list(self._pool.map(run_on_own_threads, tiles)))


@torch.inference_mode()
def _run_padded(rows: int, function: Callable[..., torch.Tensor], tile: tuple[torch.Tensor, ...]) -> torch.Tensor:
    count = len(tile[0])
    missing = rows - count
    padded = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x for x in tile]
    return function(*padded)[:count]
