"""A simulated rater's taste on the tiny world: picks, a fitted reward, two rounds that select by it.

    python -m bench.simulated_rater FOLDER              # selects by the fitted reward
    python -m bench.simulated_rater FOLDER --control    # the same candidates, selected by the shipped reward

Run it in the project's folder. The rater meets 100 prompts with base's candidates and picks the smallest shape among
the images that show what the prompt says; without such an image, all are bad. A shape is small if its radius is in the
lower half of the world's. FOLDER keeps the campaigns, so a killed run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import numpy as np
import torch
import typer
from ruamel.yaml import YAML

from demo.judge import SceneJudge
from demo.scenes import RADII
from demo.truth import read_image
from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.evaluation.bootstrap import mean_interval
from srpo.rewards.batches import to_tensor
from srpo.rounds import BASE, Round

PICKS = 100
KEYS = ("001", "002")


def sizes(images: torch.Tensor) -> np.ndarray:
    """Return the mean radius of each image's shapes between the world's smallest (0) and largest (1), float [n].

    Images in which no shape can be read are 1.
    """
    found = []
    for image in images.permute(0, 2, 3, 1).numpy():
        items = read_image(image).items
        low, high = RADII[len(items)] if items else (0.0, 1.0)
        found.append(np.mean([(item.radius - low) / (high - low) for item in items]) if items else 1.0)
    return np.array(found)


def right_of(images: torch.Tensor, prompts: list[str]) -> np.ndarray:
    """Return whether each image shows what its prompt says, bool [n]."""
    return SceneJudge(None, None, torch.device("cpu")).score(images, prompts).bool().numpy()


def pick(round: Round) -> None:
    """Decide about PICKS prompts as the page would save it."""
    from srpo.review.state import Review

    review = Review(round, BASE)
    for item in review.items["picks"][:PICKS]:
        rows = review.prompts[item].to_dicts()
        images = to_tensor({"bytes": review.images.bytes_at(row["place"])} for row in rows)
        right = right_of(images, [row["prompt"] for row in rows])
        best = int(np.where(right, sizes(images), np.inf).argmin())
        data = {"id": uuid4().hex, "rater": "simulated", "item": item, "seconds": 1.0, "scores_shown": False}
        review.save_pick(data | {"picked": rows[best]["candidate_id"] if right.any() else None})


def report(name: str, dataset: Path) -> None:
    """Print accuracy, and the share of small shapes among right images."""
    rows = list(parquet.read_rows(dataset, ["prompt_id", "prompt", "image"]))
    images, texts = to_tensor(row["image"] for row in rows), [row["prompt"] for row in rows]
    prompts = np.array([row["prompt_id"] for row in rows])
    right = right_of(images, texts)
    small = mean_interval((sizes(images) < 0.5)[right].astype(float), prompts[right])
    accuracy = mean_interval(right.astype(float), prompts)
    print("{}: accuracy {:.3f} ({:.3f} to {:.3f}), ".format(name, *accuracy), end="")
    print("small {:.3f} ({:.3f} to {:.3f})".format(*small), flush=True)


def write_params(project: Path, root: Path, fitted: bool) -> None:
    """Two rounds, all eval prompts' images kept, at the reported guidance only."""
    raw = YAML(typ="safe").load((project / "params.yaml").read_text())
    parents = dict(zip(KEYS, (BASE, *KEYS), strict=False))
    raw["rounds"] = {key: {"parent": parents[key], "generate": {}, "select": {}, "train": {}} for key in KEYS}
    raw["evaluate"] |= {"guidance_scales": [raw["evaluate"]["guidance_scale"]], "samples": 60}
    if fitted:
        raw["rewards"]["reward"]["role"] = "judge"
        raw["rewards"]["people"] = {"kind": "head", "model": "fitted", "role": "select"}
    (root / "params.yaml").write_text(json.dumps(raw))


def main(
    folder: Annotated[Path, typer.Argument(help="folder of the campaigns")],
    control: Annotated[bool, typer.Option("--control", help="select by the shipped reward")] = False,
) -> None:
    """Run one campaign and print its table."""
    from srpo.models.hub import Source
    from srpo.review.fit_reward import fit_reward
    from srpo.stages.base import pin_base
    from srpo.stages.evaluate import evaluate
    from srpo.stages.generate import generate
    from srpo.stages.score import score
    from srpo.stages.select import select
    from srpo.stages.train import train

    logging.getLogger("srpo").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    project, root = Path.cwd(), (folder / ("control" if control else "fitted")).absolute()
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "data").exists():
        shutil.copytree(project / "data", root / "data")
    os.chdir(root)  # local models are found from the project's folder

    def at(key: str) -> Round:
        return Round.of(load_params(), root, key)

    write_params(project, root, fitted=False)
    pin_base(at(BASE))
    if not at("001").files.candidates.exists():
        generate(at("001"))
    if not control:
        if not (root / "review").exists():
            pick(at("001"))
        if not (root / "fitted").exists():
            print(fit_reward([at("001")], Source("data/reward", None), root / "fitted"))
        write_params(project, root, fitted=True)
        pin_base(at(BASE))
    for key in (BASE, *KEYS):
        files = at(key).files
        outs = {files.candidates: generate, files.scores: score, files.winners: select, files.adapter: train}
        for out, stage in outs.items() if key != BASE else ():
            if not out.exists():
                stage(at(key))
        if not (files.evaluation / "samples.parquet").exists():
            evaluate(at(key))
        report(key, files.evaluation / "samples.parquet")


if __name__ == "__main__":
    typer.run(main)
