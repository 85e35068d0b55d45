"""Training on a GPU: steps as on the CPU, in 16 bits near float32, and the same after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from srpo.config.loader import Params
from srpo.lineage.record import UNET_FILE, WEIGHTS_FILE
from srpo.rounds import Round, RoundFiles
from srpo.stages.train import train
from tests.gpu.helpers import DEVICE, marks, on
from tests.training.helpers import losses, with_train

pytestmark = marks

FILES = {"lora": WEIGHTS_FILE, "full": UNET_FILE}


def trained(params: Params, root: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train round 001; its losses and weights."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second device in one process
    train(Round.of(params, root, "001"))
    files = RoundFiles(root, "001")
    return losses(files), load_file(files.adapter / FILES[params.train.method])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_are_those_of_the_cpu(params: Params, root: Path, method: str, objective: str) -> None:
    wanted = with_train(params, method=method, objective=objective, dpo_beta=20.0, steps=2, warmup_steps=0)
    expected, weights = trained(on(wanted, "cpu"), root)
    found, moved = trained(on(wanted), root)
    assert found == pytest.approx(expected, rel=5e-3)
    assert moved.keys() == weights.keys()
    rate = wanted.train.learning_rate  # AdamW's first steps are of this size, whatever the gradient's
    differences = torch.cat([(moved[name] - value).abs().flatten() for name, value in weights.items()])
    assert differences.max() <= 4.1 * rate
    assert differences.mean() < 0.1 * rate


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_losses_are_near_float32(params: Params, root: Path, method: str) -> None:
    wanted = with_train(params, method=method, steps=4)
    exact, _ = trained(on(wanted), root)
    found, weights = trained(on(wanted, dtype="bfloat16"), root)
    assert found != exact
    assert found == pytest.approx(exact, rel=0.03)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_recomputed_activations_give_the_same_losses(params: Params, root: Path) -> None:
    wanted = with_train(params, steps=3)
    plain, _ = trained(on(wanted), root)
    recomputed, _ = trained(on(wanted, gradient_checkpointing=True), root)
    assert recomputed == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_training_goes_on(params: Params, root: Path, method: str) -> None:
    wanted = on(with_train(params, method=method, steps=6, ema_decay=0.9), checkpoint_every=2)
    expected, weights = trained(wanted, root)
    told: list[int] = []

    def dies(metrics, step: int) -> None:
        told.append(step)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Round.of(wanted, root, "001"), dies)
    assert told == [1, 2, 3, 4]
    assert len(list((root / ".srpo" / "scratch").glob("train@001-*/state-*.safetensors"))) == 1
    found, resumed = trained(wanted, root)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(torch.allclose(resumed[name], value, atol=1e-4) for name, value in weights.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_train_as_one_does(params: Params, root: Path) -> None:
    wanted = on(with_train(params, steps=4), DEVICE)
    expected, weights = trained(wanted, root)
    found, shared = trained(on(wanted, processes=2), root)
    assert found == pytest.approx(expected, rel=1e-3)
    assert all(torch.allclose(shared[name], value, atol=2e-4) for name, value in weights.items())
