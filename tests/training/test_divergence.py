"""A training that diverges stops with one line, and its last good state is an adapter."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from srpo import cli
from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.sampling.sampler import Sampler
from srpo.stages.train import train
from srpo.training.divergence import DivergenceMonitor
from tests.training.helpers import contents, with_runtime, with_train, write_train


def step_of(loss: float, grad_norm: float = 1.0, **errors: float) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm} | errors


def trips(losses, ratio: float | None = 10.0, batch_size: int = 32) -> int | None:
    """Return the step at which the monitor reports a problem."""
    monitor = DivergenceMonitor(ratio, None, batch_size)
    return next((step for step, loss in enumerate(losses, 1) if monitor.check(step_of(loss))), None)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("seed", range(3))
def test_noisy_diffusion_losses_never_trip_it(batch_size: int, seed: int) -> None:
    """Errors of a sample run over three orders of magnitude with the timestep, and fall slowly over the training."""
    draw = np.random.default_rng(seed)
    steps = 3000
    timestep, noise = draw.random((steps, batch_size)), draw.lognormal(0, 0.5, (steps, batch_size))
    losses = (noise * 10 ** (-3 * timestep)).mean(1) * np.linspace(1, 0.5, steps)
    assert trips(losses, batch_size=batch_size) is None


def test_a_loss_may_rise_back_to_its_start() -> None:
    assert trips([0.7] * 30 + [0.001] * 100 + [0.5] * 100) is None


@pytest.mark.parametrize("after", [0, 3, 50, 500])
def test_a_loss_that_explodes_trips_it_soon(after: int) -> None:
    draw = np.random.default_rng(0)
    steady = draw.lognormal(-1, 0.3, after)
    found = trips([*steady, *(0.4 * 1.5**k for k in range(40))])
    assert found is not None and found <= after + 20
    assert trips([*steady, *[300.0] * 40]) is not None, "a plateau far above the loss of predicting zero"


def test_nan_trips_it_at_once_and_null_only_then() -> None:
    for bad in (math.nan, math.inf):
        assert trips([0.3] * 4 + [bad]) == 5
        monitor = DivergenceMonitor(None, None, 32)
        assert monitor.check(step_of(0.3, bad)).startswith("train.learning_rate: the gradient is not a number")
    assert trips([0.3] * 30 + [1e9] * 100, ratio=None) is None


def test_a_rising_loss_is_seen_before_divergence() -> None:
    monitor = DivergenceMonitor(10.0, None, 32)
    seen = [
        (monitor.check(step_of(loss)), monitor.is_rising) for loss in [0.3] * 30 + [3.0 * 1.2**k for k in range(20)]
    ]
    stop = next(i for i, (problem, _) in enumerate(seen) if problem)
    first = next(i for i, (_, rising) in enumerate(seen) if rising)
    assert 30 <= first < stop


def test_winners_that_leave_the_reference_trip_it() -> None:
    """While the loss itself falls, as DPO's does when losers get worse faster."""
    draw = np.random.default_rng(0)
    monitor = DivergenceMonitor(10.0, 1.5, 32)
    seen = []
    for step in range(200):
        reference = 0.1 * draw.lognormal(0, 0.5)  # errors vary with the noise level, alike for both models
        errors = {"winner_error": reference * (1 + step / 100), "reference_winner_error": reference}
        problem = monitor.check(step_of(0.69 * 0.99**step, **errors))
        seen.append((problem, monitor.is_rising))
    stop = next(i for i, (problem, _) in enumerate(seen) if problem)
    first = next(i for i, (_, rising) in enumerate(seen) if rising)
    assert 20 < first < 45 and 50 < stop < 80
    assert seen[stop][0].startswith("train.learning_rate: the winners' error") and "1.5 (train.max_w" in seen[stop][0]
    monitor = DivergenceMonitor(10.0, None, 32)
    assert not any(monitor.check(step_of(0.5, winner_error=9, reference_winner_error=1)) for _ in range(50))


def exploding(monkeypatch: pytest.MonkeyPatch, at: int, factor: float) -> None:
    """Make the loss explode from step `at` on, as a bad batch would."""
    import srpo.training.loop as loop

    real = loop.TrainingLoop._sample_batch

    def draw(self, step, indices):
        batch = real(self, step, indices)
        if step >= at:
            batch.weights.mul_(factor)
        return batch

    monkeypatch.setattr(loop.TrainingLoop, "_sample_batch", draw)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("factor", "words"), [(math.nan, "the loss is not a number"), (1e4, "the mean loss of the last")]
)
def test_the_last_good_state_is_a_usable_adapter(
    params: Params, root: Path, monkeypatch: pytest.MonkeyPatch, method: str, factor: float, words: str
) -> None:
    files, wanted = RoundFiles(root, "001"), with_train(params, method=method, batch_size=16, lr_schedule="constant")
    before = contents(files)
    train(Round.of(with_train(wanted, steps=6, warmup_steps=0), root, "001"))
    expected = Sampler(params, files.adapter).unet.state_dict()
    published = contents(files)
    assert published != before
    exploding(monkeypatch, 8, factor)
    wanted = with_runtime(with_train(wanted, steps=40, warmup_steps=0), checkpoint_every=3)
    with pytest.raises(UserError) as caught:
        train(Round.of(wanted, root, "001"))
    line = str(caught.value)
    assert line.startswith("train.learning_rate: ") and words in line and "\n" not in line
    assert "at step 8; lower it. The last good state, after step 6, is the adapter " in line
    adapter = Path(line.rsplit(" ", 1)[1])
    assert contents(files) == published, "the diverged model was published"
    found = Sampler(params, adapter).unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="at step 8"):  # again, from the last state
        train(Round.of(wanted, root, "001"))


def test_far_too_high_learning_rate_exits_2(root: Path, capfd: pytest.CaptureFixture) -> None:
    write_train(root, method="full", steps=30, learning_rate=1.0, batch_size=16)
    assert cli.run(["train", "001"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("srpo: error:")]
    assert len(lines) == 1 and "train.learning_rate: the" in lines[0] and "No checkpoint was saved" in lines[0]
