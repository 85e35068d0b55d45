"""`srpo score-images`: any folder, with and without a project; bad input is one line and status 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from srpo import cli
from tests.support.world import SIZE, write_prompts

PIXELS = np.random.default_rng(0).integers(0, 255, (6, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two prompts, in three formats and two sizes; the last is black."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(PIXELS[0]).save(folder / "eval-0000.png")
    Image.fromarray(PIXELS[1]).save(folder / "eval-0001-0.webp", lossless=True)
    Image.fromarray(PIXELS[2]).save(folder / "eval-0001-12.PNG")
    Image.fromarray(PIXELS[3]).resize((48, 40)).save(folder / "eval-0001-2.jpg")
    Image.new("RGB", (SIZE, SIZE)).save(folder / "eval-0001-3.png")
    (folder / "notes.txt").write_text("no image")
    write_prompts(tmp_path / "prompts.jsonl", ["a red circle", "a blue square"], "eval")
    return folder


def run(*arguments: object) -> int:
    return cli.run(["score-images", *map(str, arguments)])


def test_folder_without_a_project(
    folder: Path, shared_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from srpo.rewards.clip import ClipReward

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("COLUMNS", "240")
    one, two = shared_world / "data" / "reward", shared_world / "data" / "judge"
    reward = ["--reward", f"clip={one}", "--reward", f"clip={two}"]
    assert run(folder, "--prompts", tmp_path / "prompts.jsonl", *reward, "--out", "found/scores.parquet") == 0
    table = pl.read_parquet("found/scores.parquet")
    assert table["file"].to_list() == [
        "eval-0000.png", "eval-0001-0.webp", "eval-0001-12.PNG", "eval-0001-2.jpg", "eval-0001-3.png",
    ]  # fmt: skip
    assert table["prompt"].to_list() == ["a red circle"] + ["a blue square"] * 4
    assert table["prompt_id"].to_list() == ["eval-0000"] + ["eval-0001"] * 4
    assert table["invalid"].to_list() == [False] * 4 + [True]
    assert table.columns[3:] == ["clip", f"clip={two}", "invalid"]
    images = torch.from_numpy(PIXELS[:3]).permute(0, 3, 1, 2).contiguous()
    expected = ClipReward(str(one), None, torch.device("cpu")).score(images, table["prompt"].to_list()[:3])
    assert table["clip"].to_list()[:3] == pytest.approx(expected.tolist(), abs=1e-4)
    shown = capfd.readouterr().out
    ordered = table.sort("clip")["file"].to_list()
    assert ordered[0] in shown and ordered[-1] in shown
    assert f"{table['clip'].mean():.3f}" in shown
    assert "5 images, 1 of one flat color; all scores: found/scores.parquet" in shown


def test_reward_of_params_yaml(folder: Path, world: Path) -> None:
    assert run(folder, "--prompt", "a red circle", "--reward", "judge") == 0
    table = pl.read_parquet("image-scores.parquet")
    assert table["judge"].is_finite().all() and table["prompt_id"].is_null().all()


def test_custom_class(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_rewards.py").write_text(
        "class Redness:\n"
        "    def __init__(self, model, revision, device, dtype): pass\n"
        "    def score(self, images, prompts): return images[:, 0].float().mean(dim=(1, 2))\n"
    )
    assert run(folder, "--prompt", "x", "--reward", "own_rewards:Redness") == 0
    table = pl.read_parquet("image-scores.parquet")
    assert table["own_rewards:Redness"][0] == pytest.approx(PIXELS[0][..., 0].mean(), abs=1e-3)


def test_revision_follows_the_last_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo.tools.score_images import reward_specs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    specs, _ = reward_specs(["clip=owner/name@abc", "pickscore=a@b", "hpsv2"])
    found = [(spec.model, spec.revision) for spec in specs.values()]
    assert found[:2] == [("owner/name", "abc"), ("a@b", None)]
    assert found[2][0] == "xswu/HPSv2" and len(found[2][1]) == 40


def test_unreadable_images_are_skipped(folder: Path, world: Path, capfd: pytest.CaptureFixture) -> None:
    whole = (folder / "eval-0000.png").read_bytes()
    (folder / "eval-0000-1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "eval-0000-2.png").write_text("no image")
    assert run(folder, "--prompt", "a red circle", "--reward", "judge") == 1
    assert pl.read_parquet("image-scores.parquet").height == 5
    shown = capfd.readouterr().err
    assert "eval-0000-1.png: not a readable image" in shown and "eval-0000-2.png: not a readable image" in shown
    assert "srpo: error: 2 files are not readable images; all others are scored" in shown
    Path("image-scores.parquet").unlink()
    assert run(folder, "--prompt", "a red circle", "--reward", "judge", "--strict") == 2
    assert "eval-0000-1.png: not a readable image" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not Path("image-scores.parquet").exists()


BAD = {
    "no folder": (["nowhere", "--prompt", "x", "--reward", "clip"], "nowhere: no such folder"),
    "no image": (["empty", "--prompt", "x", "--reward", "clip"], "empty: no images"),
    "no prompt": (["images", "--reward", "clip"], "--prompts: give either a prompt file, or one --prompt"),
    "both": (
        ["images", "--reward", "clip", "--prompt", "x", "--prompts", "prompts.jsonl"],
        "give either a prompt file",
    ),
    "no reward": (["images", "--prompt", "x"], "--reward"),
    "unknown reward": (
        ["images", "--prompt", "x", "--reward", "clap"],
        "--reward: unknown reward 'clap'; choose one of clip,",
    ),
    "unknown kind": (["images", "--prompt", "x", "--reward", "clap=m"], "--reward: unknown reward 'clap'"),
    "no model": (
        ["images", "--prompt", "x", "--reward", "templates"],
        "templates has no published model; write templates=model",
    ),
    "missing model": (
        ["images", "--prompt", "x", "--reward", "clip=./nowhere"],
        "rewards.clip: can't load './nowhere'",
    ),
    "missing prompt file": (["images", "--prompts", "no.jsonl", "--reward", "clip"], "no.jsonl: no such prompt file"),
    "prompt of no line": (
        ["others", "--prompts", "prompts.jsonl", "--reward", "clip"],
        "others/x-1.png: no prompt with id 'x' in prompts.jsonl",
    ),
    "broken image": (["broken", "--prompt", "x", "--reward", "CLIP"], "broken/a.png: not a readable image"),
    "folder as out": (["images", "--prompt", "x", "--reward", "clip", "--out", "empty"], "--out: empty is a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, folder: Path, shared_world: Path, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("empty", "others", "broken"):
        Path(other).mkdir()
    Image.fromarray(PIXELS[0]).save("others/x-1.png")
    whole = (folder / "eval-0000.png").read_bytes()
    Path("broken/a.png").write_bytes(whole[: len(whole) // 2])
    arguments, expected = BAD[name]
    local = [f"clip={shared_world / 'data' / 'reward'}" if word == "CLIP" else word for word in arguments]
    assert run(*local) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("srpo: error: ") and expected in error
    assert not Path("image-scores.parquet").exists()
