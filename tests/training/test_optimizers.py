"""Optimizers by name: each trains, and resumes to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.runtime import extras
from srpo.sampling.sampler import Sampler
from srpo.stages.train import train
from srpo.training.model import make_trainable
from srpo.training.optimizers import make_optimizer
from tests.training.helpers import contents, losses, with_runtime, with_train
from tests.training.test_resume import interrupted

VALUES = {"adafactor": {}, "adamw_8bit": {"rank": 256}, "prodigy": {"learning_rate": 1.0, "warmup_steps": 2}}

SLOW = ("adafactor", "prodigy")


@pytest.mark.parametrize("name", ["adamw_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_optimizer_resumes_to_the_same_bytes(params: Params, root: Path, name: str) -> None:
    """Of 8-bit states, too: at rank 256 the matrices are large enough for bitsandbytes to quantize them."""
    files = RoundFiles(root, "001")
    values = {"optimizer": name, "steps": 5, "ema_decay": 0.9, "learning_rate": 1e-3, **VALUES[name]}
    wanted = with_runtime(with_train(params, **values), checkpoint_every=2)
    train(Round.of(wanted, root, "001"))
    undisturbed = contents(files)
    interrupted(wanted, root, 4)
    train(Round.of(wanted, root, "001"))
    assert contents(files) == undisturbed
    train(Round.of(with_train(wanted, optimizer="adamw"), root, "001"))
    assert losses(files) and contents(files) != undisturbed


def test_what_is_missing_is_one_line(params: Params, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round = Round.of(params, root, "001")
    model = make_trainable(Sampler(params).unet, round, with_reference=False, dtype=torch.float32)
    trained = list(model.parameters.values())

    def make(name: str) -> torch.optim.Optimizer:
        return make_optimizer(params.train.model_copy(update={"optimizer": name}), trained, torch.device("cpu"))

    with pytest.raises(UserError, match=r"^train\.optimizer: paged_adamw_8bit needs CUDA; take"):
        make("paged_adamw_8bit")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name in ("adamw_8bit", "prodigy"):
        with pytest.raises(UserError, match=rf"^train\.optimizer: {name} needs .*; pip install 'srpo\[optimizers\]'"):
            make(name)


def test_float16_is_refused(params: Params, root: Path) -> None:
    with pytest.raises(UserError, match=r"^runtime\.dtype: .* float16; train in bfloat16"):
        train(Round.of(with_runtime(params, dtype="float16"), root, "001"))


@pytest.mark.slow
def test_bitsandbytes_is_silent() -> None:
    """PEFT imports it where it is installed, and it would warn of kernels for other models in every stage."""
    import_all = "import srpo.cli, sys; srpo.cli.run(['--help']); import peft; assert 'bitsandbytes' in sys.modules"
    done = subprocess.run([sys.executable, "-c", import_all], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
