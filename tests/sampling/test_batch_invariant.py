"""Results of a row do not depend on the rows beside it."""

from __future__ import annotations

import threading

import pytest
import torch

from srpo.sampling import batch_invariant
from srpo.sampling.batch_invariant import BatchInvariant, tile_rows


@pytest.mark.parametrize("count", [1, 8, 9, 16, 21])
def test_rows_do_not_depend_on_their_batch(count: int) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 5))
    rows = torch.randn(21, 4, 8, 8)
    seen, threads = [], torch.get_num_threads()

    def function(tile: torch.Tensor) -> torch.Tensor:
        seen.append((len(tile), torch.is_inference_mode_enabled()))
        return network(tile)

    whole = BatchInvariant().run(8, function, rows)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(BatchInvariant().run(8, function, rows[:count]), whole[:count])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(8, True)}
    torch.testing.assert_close(whole.clone(), network(rows))


def test_a_large_network_sees_one_row_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is padded, tiles do not run side by side, and rows do not depend on their batch."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 5))
    assert tile_rows(network, 64) == 64
    monkeypatch.setattr(batch_invariant, "LARGE_WEIGHTS", 1000)
    assert tile_rows(network, 64) == 1
    seen = []

    def function(tile: torch.Tensor) -> torch.Tensor:
        seen.append((len(tile), threading.get_ident()))
        return network(tile)

    rows = torch.randn(5, 4, 8, 8)
    whole = BatchInvariant().run(1, function, rows)
    assert torch.equal(BatchInvariant().run(1, function, rows[:2]), whole[:2])
    assert seen == [(1, threading.get_ident())] * 7
