"""Tiles: a network sees rows in groups of one fixed number.

CPU kernels choose their order of summation by shape, so this is what makes results independent of the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Tiles:
    """Runs functions over tensors, so many rows at a time; several tiles side by side, each on its share of the cores.

    Small networks gain more from cores of their own than from sharing all of them.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="srpo-tile")

    def run(self, rows: int, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """The function's result [n, ...] for tensors [n, ...].

        Args:
            rows: of a tile; the last one is filled up with copies of its last row.
            function: row by row, from tensors [rows, ...] to one of [rows, ...]; called in inference mode.
        """
        tiles = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
        if len(tiles) == 1 or self._threads == 1:
            return torch.cat([_run(rows, function, tile) for tile in tiles])
        threads = max(1, self._threads // len(tiles))

        def beside(tile: tuple[torch.Tensor, ...]) -> torch.Tensor:
            torch.set_num_threads(threads)  # of this thread alone
            return _run(rows, function, tile)

        return torch.cat(list(self._pool.map(beside, tiles)))


@torch.inference_mode()
def _run(rows: int, function: Callable[..., torch.Tensor], tile: tuple[torch.Tensor, ...]) -> torch.Tensor:
    count = len(tile[0])
    missing = rows - count
    padded = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x for x in tile]
    return function(*padded)[:count]
