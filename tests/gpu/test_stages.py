"""Stages on a GPU: scores keep their order in float16, and two processes share one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data.records import read_sweep
from srpo.data.scores import read_scores
from srpo.errors import UserError
from srpo.rewards.hps import HpsV21
from srpo.rewards.imagereward import ImageReward
from srpo.rewards.loading import load_reward
from srpo.rewards.protocol import Reward
from srpo.rounds import Round, RoundFiles
from srpo.runtime.device import pick_reward_dtype
from srpo.stages.evaluate import evaluate
from srpo.stages.score import score
from tests.gpu.helpers import DEVICE, marks, on
from tests.rewards.checkpoints import SIDE, hps_folder, imagereward_folder

pytestmark = marks

REPO = Path(__file__).parents[2]
TEXTS = ["a red circle", "a blue square"] * 16


def soft_images(side: int) -> torch.Tensor:
    """32 random images without fine detail, uint8 [32, 3, side, side]."""
    coarse = 255 * torch.rand(32, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return smooth.clamp(0, 255).round().byte()


def order_is_kept(exact: torch.Tensor, found: torch.Tensor) -> None:
    """Assert that float16's error is small beside the spread, and that only near ties swap places."""
    spread = exact.std()
    assert spread > 0
    worst = (found - exact).abs().max()
    assert worst < spread / 20
    ahead = exact[:, None] - exact[None, :] > 2 * worst
    assert (found[:, None] > found[None, :])[ahead].all()


@pytest.mark.parametrize("name", ["clip", "hps", "imagereward"])
def test_rewards_keep_their_order_in_float16(params: Params, root: Path, tmp_path: Path, name: str) -> None:
    def load(device: str) -> Reward:
        at = torch.device(device)
        dtype = pick_reward_dtype(on(params, device, dtype="auto").runtime, at)
        assert dtype == (torch.float16 if device == "cuda" else torch.float32)
        if name == "clip":
            return load_reward(params.rewards["reward"], root, at, dtype)
        return (HpsV21 if name == "hps" else ImageReward)(str(folder), None, at, dtype)

    folder = tmp_path / "model"
    if name == "hps":
        hps_folder(folder, "HPS_v2.1_compressed.pt")
    elif name == "imagereward":
        imagereward_folder(folder)
    images = soft_images(2 * SIDE)
    order_is_kept(load("cpu").score(images, TEXTS), load(DEVICE).score(images, TEXTS))


def test_scores_of_a_round_agree_with_the_cpu(params: Params, root: Path) -> None:
    tables = []
    for device in ("cpu", DEVICE):
        score(Round.of(on(params, device, dtype="auto"), root, "001"))
        tables.append(read_scores(RoundFiles(root, "001").scores, {"reward": "select", "judge": "judge"}))
        for file in RoundFiles(root, "001").scores.rglob("*.parquet"):
            file.unlink()  # else they are up to date
    assert tables[1]["candidate_id"].to_list() == tables[0]["candidate_id"].to_list()
    for name in ("reward", "judge"):
        assert tables[1][name].to_list() == pytest.approx(tables[0][name].to_list(), abs=0.1)


def test_two_processes_share_an_evaluation(params: Params, root: Path) -> None:
    """Two workers on one device make the units of a run in one process; a run after them only reads these."""
    text = (root / "params.yaml").read_text()
    assert "device: auto\n  dtype: auto" in text
    text = text.replace("device: auto\n  dtype: auto", f"device: {DEVICE}\n  dtype: float32")
    (root / "params.yaml").write_text(text.replace("images_per_prompt: 2", "images_per_prompt: 80"))
    params = load_params()
    files = RoundFiles(root, "base")
    evaluate(Round.of(params, root, "base"))
    expected = read_sweep(files)
    (files.evaluation / "guidance.csv").unlink()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "srpo", "evaluate", "base"],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path]),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
            },
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    (scratch,) = (root / ".srpo" / "scratch").glob("evaluate@base-*")
    assert len(list(scratch.glob("guidance-*.safetensors"))) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srpo.stages.evaluate.Sampler", None)  # nothing is left to sample
        evaluate(Round.of(params, root, "base"))
    for guidance, record in read_sweep(files).items():
        assert record == pytest.approx(expected[guidance], rel=1e-3, abs=1e-3)


def test_more_processes_than_devices_is_one_line(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo.runtime.device import pick_device

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(UserError, match=r"runtime\.processes: more than this machine's \d+ CUDA devices"):
        pick_device(on(params).runtime)
