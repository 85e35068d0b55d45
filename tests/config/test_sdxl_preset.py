"""The SDXL preset's own code path: Hub ids, pinned revisions, variant, VAE, published rewards, Inception; only smaller.

Models are small and random but lie in the Hub's cache under the published names and in the published layouts, so that
all that differs from a real run is numbers.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from srpo import cli
from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE
from srpo.data.scores import read_scores
from srpo.storage.json_files import write_json
from tests.support.hub import build_home
from tests.support.world import SIZE, write_prompts

REPO = Path(__file__).parents[2]
# all that is changed of presets/sdxl.yaml: sizes and counts, and a CPU for the GPU
REDUCED: dict[str, Any] = {
    "generate.candidates_per_prompt": 3,
    "generate.num_inference_steps": 3,
    "generate.height": SIZE,
    "generate.width": SIZE,
    "generate.prompts_per_shard": 3,
    "train.rank": 2,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.warmup_steps": 1,
    "evaluate.num_inference_steps": 3,
    "evaluate.height": SIZE,
    "evaluate.width": SIZE,
    "runtime.device": "cpu",
    "runtime.train_batch_size": 2,
    "runtime.checkpoint_every": 2,
}
VAE_SNAPSHOTS = "models--madebyollin--sdxl-vae-fp16-fix/snapshots"
ROUND = ("generate 001", "score 001", "select 001", "train 001", "evaluate 001", "gate 001", "report 001")
# one process for all stages: their imports are most of the time
RUN = """
import sys
from srpo import cli
for command in sys.argv[1:]:
    if code := cli.run(command.split()):
        sys.exit(f"srpo {command}: exit status {code}")
"""


def reduced(path: Path) -> None:
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    for key, value in REDUCED.items():
        section, name = key.split(".")
        assert name in raw[section], f"the preset no longer sets {key}"
        raw[section][name] = value
    write_json(path, raw)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`srpo init --preset sdxl`, reduced, with prompts and reference images, run through round 001 offline."""
    root = tmp_path_factory.mktemp("sdxl") / "project"
    assert cli.run(["init", "--preset", "sdxl", str(root)]) == 0
    whole = load_params(root / "params.yaml")
    reduced(root / "params.yaml")
    shutil.rmtree(root / "data")
    texts = [f"{count} {color} fox" for count in ("one", "two") for color in ("red", "white", "old", "sad")]
    write_prompts(root / whole.prompts.train, texts[:4], "train")
    write_prompts(root / whole.prompts.eval, texts[4:], "eval")
    images = np.random.default_rng(0).integers(0, 255, (12, SIZE, SIZE, 3), dtype=np.uint8)
    rows = [{"image": encode_image(pixels)} for pixels in images]
    for number in range(2):
        part = root / whole.evaluate.reference / f"part-{number}.parquet"
        parquet.write_table(part, rows[6 * number : 6 * number + 6], {"image": IMAGE})
    environment = os.environ | build_home(root.parent / "home", whole) | {"PYTHONPATH": str(REPO)}
    environment.pop("SRPO_FORK_SERVER", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "base", "evaluate base", *ROUND],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "environment.json").write_text(json.dumps({key: environment[key] for key in ("HF_HOME", "TORCH_HOME")}))
    return root


def test_the_round_is_whole(project: Path) -> None:
    folder = project / "rounds" / "001"
    candidates = list(parquet.read_rows(folder / "candidates", ["candidate_id", "guidance", "latents_shape"]))
    assert len(candidates) == 4 * 3 and {row["guidance"] for row in candidates} == {3.0}
    scores = read_scores(folder / "scores", {"pick": "select", "hps": "judge", "clip": "judge"})
    assert all(scores[name].is_finite().all() and scores[name].n_unique() > 1 for name in ("pick", "hps", "clip"))
    assert len(list(parquet.read_rows(folder / "winners", ["pick"]))) == 4
    weights = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in weights)
    assert all(value.abs().sum() > 0 for value in weights.values())
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["guidance"] == 5.0 and metrics["verdict"] in ("pass", "fail")
    assert {"hps_win_rate_low", "clip_win_rate_low", "fid", "kid", "cmmd"} <= metrics.keys()
    assert (folder / "report" / "index.html").stat().st_size > 10_000


def test_the_presets_vae_made_the_images(project: Path) -> None:
    params = load_params(project / "params.yaml")
    snapshots = Path(json.loads((project / "environment.json").read_text())["HF_HOME"], "hub", VAE_SNAPSHOTS)
    vae = AutoencoderKL.from_pretrained(snapshots / params.model.vae_revision)
    rows = list(parquet.read_rows(project / "rounds" / "001" / "candidates", ["image", "latents", "latents_shape"]))
    latents = torch.from_numpy(np.stack([parquet.latents_array(row) for row in rows])).float()
    with torch.inference_mode():
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
    wanted = (decoded.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    made = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    assert np.abs(made - wanted).max() < 1.5


def test_what_it_stands_on_is_pinned(project: Path) -> None:
    lineage = json.loads((project / "rounds" / "base" / "adapter" / "lineage.json").read_text())
    assert lineage["base"]["revision"] == "462165984030d82259a11f4367a4eed129e94a7b"
    rewards = json.loads((project / "rounds" / "base" / "rewards.json").read_text())
    assert all(len(reward["revision"]) == 40 for reward in rewards.values())


def test_check_finds_every_model(project: Path) -> None:
    environment = os.environ | json.loads((project / "environment.json").read_text()) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "srpo", "check"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout
    for key in ("model.base", "model.vae", "rewards.pick.model", "rewards.hps.model", "rewards.clip.model"):
        assert lines[key].startswith("ok") and lines[key].endswith("in the Hub's cache"), lines[key]
    assert lines["evaluate.features"].startswith("ok") and "none longer than" in lines["prompts.train"]
