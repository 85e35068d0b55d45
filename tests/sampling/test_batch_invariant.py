"""Results of a row do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from srpo.sampling.batch_invariant import BatchInvariant


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
