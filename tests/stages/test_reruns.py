"""Which stages DVC runs again after a change: only those that the change concerns.

Stages are stand-ins that write what the real ones make of their inputs: the graph in dvc.yaml is the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.world import REPO

pytestmark = pytest.mark.slow

STAND_IN = """#!{python}
import hashlib, json, pathlib, sys

stage, key = (sys.argv[1:] + ["base"])[:2]
params = json.loads(pathlib.Path("params.yaml").read_text())
folder, base = pathlib.Path("rounds", key), pathlib.Path("rounds/base")
rewards = params["rewards"]


def mix(*parts):
    texts = [p.read_text() if isinstance(p, pathlib.Path) else json.dumps(p, sort_keys=True) for p in parts]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def write(path, content):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(content)


def of_role(role):
    return {{name: spec for name, spec in rewards.items() if spec["role"] == role}}


if stage == "base":
    write("adapter/lineage.json", mix(params["model"]))
    write("rewards.json", json.dumps({{name: spec.get("model") for name, spec in rewards.items()}}))
    write("selecting.json", json.dumps(of_role("select")))
    write("preview.json", "{{}}")
if stage == "generate":
    write("candidates/x", mix(params["generate"], params["rounds"][key]["generate"], params["seed"]))
if stage == "score":
    for role in ("select", "judge"):
        for name, spec in of_role(role).items():
            write(f"scores/{{role}}/{{name}}.parquet", mix(folder / "candidates/x", spec.get("model")))
        for path in (folder / "scores" / role).iterdir():
            if path.stem not in rewards:
                path.unlink()
    write("scores/invalid.parquet", mix(folder / "candidates/x"))
if stage == "select":
    names = sorted((folder / "scores/select").iterdir())
    write("winners/x", mix(*names, folder / "candidates/x", base / "selecting.json", params["select"]))
if stage == "train":
    write("adapter/x", mix(folder / "winners/x", params["train"]))
    write("training.csv", "step,loss")
if stage == "evaluate":
    weights = base / "adapter/lineage.json" if key == "base" else folder / "adapter/x"
    content = mix(weights, params["evaluate"], rewards, pathlib.Path(params["evaluate"]["reference"]))
    names = ["per_prompt.parquet", "samples.parquet", "guidance.csv"]
    names += ["features.safetensors", "metrics.json"] if key == "base" else ["drift.json"]
    for name in names:
        write(f"evaluation/{{name}}", json.dumps(content))
if stage == "gate":
    for name in ("gate.json", "metrics.json"):
        write(f"evaluation/{{name}}", json.dumps(mix(folder / "evaluation/guidance.csv", params["gate"])))
if stage == "report":
    write("report/index.html", mix(folder / "evaluation/gate.json"))
"""
JUDGE = {"kind": "clip", "model": "data/other", "role": "judge"}
EVALUATION = ["evaluate-base", "evaluate@001", "gate@001", "report@001"]
AFTER_SELECT = ["train@001", "evaluate@001", "gate@001", "report@001"]
CHANGES: dict[str, tuple[str, Any, list[str]]] = {
    "a new judge": ("rewards.other", JUDGE, ["base", "score@001", *EVALUATION]),
    "a judge less": ("rewards.accuracy", None, ["base", "score@001", *EVALUATION]),
    "a new selecting reward": (
        "rewards.other",
        JUDGE | {"role": "select"},
        ["base", "score@001", "select@001", "evaluate-base", *AFTER_SELECT],
    ),
    "a new guidance scale": ("evaluate.guidance_scales", [1.0, 2.0, 4.0], EVALUATION),
    "a new reference set": ("evaluate.reference", "data/reference/other.parquet", EVALUATION),
    "a changed gate": ("gate.max_fid_ratio", 2.0, ["gate@001", "report@001"]),
    "votes that count": ("gate.votes", {"001": "review/001/votes-0123456789abcdef.jsonl"}, ["gate@001", "report@001"]),
    "a changed selection": ("select.top_fraction", 0.5, ["select@001", *AFTER_SELECT]),
    "a changed training": ("train.learning_rate", 0.5, AFTER_SELECT),
    "a changed sampling": (
        "generate.guidance_scale",
        4.0,
        ["base", "generate@001", "score@001", "select@001", *AFTER_SELECT],
    ),
    "other imported candidates": (
        "rounds.001.generate.candidates",
        "data/candidates-0123456789abcdef",
        ["generate@001", "score@001", "select@001", *AFTER_SELECT],
    ),
    "other hardware": ("runtime.batch_size", 1, []),
    "another campaign in MLflow": ("tracking.campaign", "second", []),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    shutil.copy(REPO / "dvc.yaml", root)
    raw = YAML(typ="safe").load((REPO / "params.yaml").read_text())
    raw["rounds"] = {"001": raw["rounds"]["001"]}
    (root / "params.yaml").write_text(json.dumps(raw))
    for name in ("prompts/train.jsonl", "prompts/eval.jsonl", "reference/reference.parquet", "reference/other.parquet"):
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_text(name)
    (root / "bin").mkdir()
    (root / "bin/srpo").write_text(STAND_IN.format(python=sys.executable))
    (root / "bin/srpo").chmod(0o755)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    assert len(reproduce(root)) == 9
    return root


def reproduce(root: Path) -> list[str]:
    """The stages that `dvc repro` ran, in order."""
    environment = os.environ | {"PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^Running stage '(.*)'", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_change_concerns_runs_again(change: str, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "campaign"
    shutil.copytree(finished, root)
    path, value, expected = CHANGES[change]
    raw = json.loads((root / "params.yaml").read_text())
    *sections, last = path.split(".")
    section = raw
    for name in sections:
        section = section[name]
    if value is None:
        del section[last]
    else:
        section[last] = value
    (root / "params.yaml").write_text(json.dumps(raw))
    assert sorted(reproduce(root)) == sorted(expected)
