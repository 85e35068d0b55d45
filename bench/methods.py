"""Ways of making rounds compared on the tiny world: the same candidates' budget, several seeds, every round evaluated.

    python -m bench.methods RUNS --arm "sft" --arm "dpo" --seeds 3 --rounds 5 [--tuning]
    python -m bench.methods RUNS --table
    python -m bench.methods RUNS --plot docs/images/methods.png --arm ...

Run it in the project's folder. RUNS keeps each campaign's files, so a killed run goes on where it was. `--tuning`
examines rounds by 60 prompts that are neither train nor eval prompts: choose settings by those, report the others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from bench.methods_shown import plot, show
from srpo.config.loader import Params, load_params
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.hashing import value_digest

# what an arm changes of params.yaml: sections for all rounds, or {"rounds": {number: sections}} for some; "pool" makes
# the train prompts all 300 scenes that nobody evaluates
BARE = {"replay": 0.0}
PLAIN_LATER = {n: {"generate": {"guidance_scale": 1.0}} for n in range(2, 6)}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},  # params.yaml as it is
    "no replay": {"train": BARE},
    "no replay; from base on all winners": {"train": BARE | {"start": "base"}},
    "no replay; guidance 3, then 1.5": {"train": BARE, "rounds": {1: {"generate": {"guidance_scale": 3.0}}}},
    "no replay; half of the prompts, by margin": {"train": BARE, "select": {"top_fraction": 0.5}},
    "no replay; 80 steps": {"train": BARE | {"steps": 80}},
    "no replay; learning rate falls": {
        "train": BARE,
        "rounds": {n: {"train": {"learning_rate": 1e-3 * 0.6 ** (n - 1)}} for n in range(2, 6)},
    },
    "no replay; learning rate falls after round 3": {
        "train": BARE,
        "rounds": {n: {"train": {"learning_rate": 3e-4}} for n in (4, 5)},
    },
    "guidance 1 after round 1": {"rounds": PLAIN_LATER},
    "guidance 1": {"generate": {"guidance_scale": 1.0}},
    "temperature 2": {"select": {"temperature": 2.0}},
    "temperature 4": {"select": {"temperature": 4.0}},
    "guidance 1 after round 1; temperature 4": {"select": {"temperature": 4.0}, "rounds": PLAIN_LATER},
    "guidance 1 after round 1; temperature 8": {"select": {"temperature": 8.0}, "rounds": PLAIN_LATER},
    "guidance 1 after round 1; temperature 4; learning rate halves": {
        "select": {"temperature": 4.0},
        "rounds": {
            n: changes | {"train": {"learning_rate": 1e-3 * 0.5 ** (n - 1)}} for n, changes in PLAIN_LATER.items()
        },
    },
    "weights by advantage": {"select": {"weighting": "advantage"}},
    "weights averaged (EMA .97)": {"train": {"ema_decay": 0.97}},
    "fresh prompts": {"generate": {"prompts_per_round": 140}, "pool": True},
    "dpo": {"train": {"objective": "dpo"}},
    "dpo, lr 3e-4": {"train": {"objective": "dpo", "learning_rate": 3e-4}},
    "dpo, beta 200": {"train": {"objective": "dpo", "dpo_beta": 200.0}},
    "nft": {"train": {"objective": "nft"}},
    "nft, lr 3e-4": {"train": {"objective": "nft", "learning_rate": 3e-4}},
}


def run(project: Path, runs: Path, arm: str, seed: int, rounds: int, steps: int | None, tuning: bool) -> None:
    """One campaign, base included; finished stages of an earlier call are kept."""
    import torch

    from srpo.stages.base import pin_base
    from srpo.stages.evaluate import evaluate
    from srpo.stages.gate import gate
    from srpo.stages.generate import generate
    from srpo.stages.score import score
    from srpo.stages.select import select
    from srpo.stages.train import train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    shared, root = runs / BASE, runs / f"{arm}-{seed}"
    for folder in (shared, root):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            pool = folder is root and ARMS[arm].get("pool", False)
            (folder / "data").symlink_to(_data(project, runs, tuning, pool).resolve())
    params = _params(project, arm, seed, rounds, steps)
    _base(params.model_copy(update={"seed": 0}), shared, pin_base, evaluate)
    if not (root / "rounds" / BASE).exists():  # every seed meets the same examination of base
        shutil.copytree(shared / "rounds" / BASE, root / "rounds" / BASE)
    for key in params.rounds:
        files = RoundFiles(root, key)
        stages = {
            files.candidates: generate, files.scores: score, files.winners: select, files.adapter: train,
        }  # fmt: skip
        known = runs / "candidates" / value_digest([key, seed, params.generate.model_dump()])[:16]
        first = params.rounds[key].parent == BASE and not params.rounds[key].generate
        if first and known.exists() and not files.candidates.exists():  # many arms begin with the same candidates
            shutil.copytree(known, files.candidates, copy_function=os.link)
        for out, stage in stages.items():
            if not out.exists():
                stage(Round.of(params, root, key))
        if first and not known.exists():
            shutil.copytree(files.candidates, known, copy_function=os.link)
        if not (files.folder / "methods.json").exists():
            examined = params.evaluate.model_copy(update={"guidance_scales": [2.0, 3.0]})
            evaluated = Round.of(params.model_copy(update={"seed": 0, "evaluate": examined}), root, key)
            evaluate(evaluated)
            gate(evaluated)
            _note(params, root, key, files.adapter)


def _base(params: Params, root: Path, pin_base, evaluate) -> None:
    files = RoundFiles(root, BASE)
    if not (files.folder / "methods.json").exists():
        pin_base(Round.of(params, root, "base"))
        evaluate(Round.of(params, root, BASE))
        _note(params, root, BASE, files.adapter)


def _note(params: Params, root: Path, key: str, adapter: Path) -> None:
    """What metrics.json says, the sweep's best accuracy, and the diversity among right images."""
    files = RoundFiles(root, key)
    found = json.loads((files.evaluation / "metrics.json").read_text())
    sweep = pl.read_csv(files.evaluation / "guidance.csv")
    found["best_accuracy"] = sweep["accuracy"].max()
    found["fid_ratio_best"] = sweep["fid"].min()
    found["diversity_right"] = diversity_among_right(params, root, adapter)
    (files.folder / "methods.json").write_text(json.dumps(found, indent=1))


def diversity_among_right(params: Params, root: Path, adapter: Path, images_per_prompt: int = 8) -> float:
    """Mean pairwise pixel RMS (0 to 1) of a prompt's images that show it, mean over prompts with two or more.

    A model's plain diversity is mostly its mistakes when it errs often; this one mistakes do not raise.
    """
    import torch

    from srpo.data.prompts import load_prompts
    from srpo.rewards.templates import TemplateReward
    from srpo.sampling.sampler import Sampler, sample_images
    from srpo.storage.hashing import derive_seed

    sampler, settings = Sampler(params, adapter), params.evaluate
    judge = TemplateReward(str(root / params.rewards["accuracy"].model), None, torch.device("cpu"))
    prompts = load_prompts(root / params.prompts.eval)
    embeds = sampler.encode([prompt.prompt for prompt in prompts])
    places = [(row, index) for row in range(len(prompts)) for index in range(images_per_prompt)]
    _, images = sample_images(
        sampler,
        embeds,
        [row for row, _ in places],
        [derive_seed(0, "diversity", prompts[row].id, index) for row, index in places],
        settings,
    )
    right = judge.score(images.permute(0, 3, 1, 2), [prompts[row].prompt for row, _ in places]).bool()
    spreads = []
    for row in range(len(prompts)):
        mine = [i for i, (at, _) in enumerate(places) if at == row and right[i]]
        if len(mine) > 1:
            flat = images[mine].flatten(1).float() / 255
            spreads.append((torch.pdist(flat) / flat.shape[1] ** 0.5).mean().item())
    return float(np.mean(spreads))


def _params(project: Path, arm: str, seed: int, rounds: int, steps: int | None) -> Params:
    params = load_params(project / "params.yaml")
    changes = {name: values for name, values in ARMS[arm].items() if name not in ("rounds", "pool")}
    raw = params.model_dump() | {"seed": seed}
    for section, values in changes.items():
        raw[section] = raw[section] | values
    if steps:
        raw["train"]["steps"] = steps
    some = ARMS[arm].get("rounds", {})
    keys = [f"{number:03d}" for number in range(1, rounds + 1)]
    raw["rounds"] = {
        key: {"parent": parent, "generate": {}, "select": {}, "train": {}} | some.get(int(key), {})
        for key, parent in zip(keys, [BASE, *keys], strict=False)
    }
    return Params.model_validate(raw)


def _pool(project: Path, runs: Path) -> Path:
    folder = runs / "pool"
    if not folder.exists():
        from demo.make import split, write_prompts
        from demo.scenes import all_scenes

        train, held_out = split(all_scenes())
        others = [scene for scene in all_scenes() if scene not in (*train, *held_out)]
        (folder / "prompts").mkdir(parents=True)
        for item in (project / "data").iterdir():
            if item.name != "prompts":
                (folder / item.name).symlink_to(item.resolve())
        shutil.copy(project / "data" / "prompts" / "eval.jsonl", folder / "prompts")
        write_prompts(folder / "prompts" / "train.jsonl", [*train, *others], "train")
    return folder


def _data(project: Path, runs: Path, tuning: bool, pool: bool = False) -> Path:
    """data/ of the project, or a copy whose eval prompts and reference are 60 scenes that nothing else uses.

    With `pool`, a copy whose train prompts are all scenes but the eval prompts'.
    """
    if pool:
        return _pool(project, runs)
    if not tuning:
        return project / "data"
    folder = runs / "data"
    if not folder.exists():
        from demo.make import write_images, write_prompts
        from demo.scenes import all_scenes, render

        partial = runs / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(project / "data", partial)
        scenes, order = all_scenes(), np.random.default_rng(3).permutation(360)
        held_out, rng = [scenes[i] for i in order[200:260]], np.random.default_rng(5)
        write_prompts(partial / "prompts" / "eval.jsonl", held_out, "tuning")
        write_images(
            partial / "reference" / "reference.parquet",
            [(scene, render(scene, rng)) for scene in held_out for _ in range(6)],
        )
        partial.rename(folder)
    return folder


def main(
    runs: Annotated[Path, typer.Argument(help="folder of the campaigns")],
    arm: Annotated[list[str] | None, typer.Option(help="one of ARMS; repeat for more")] = None,
    first_seed: Annotated[int, typer.Option()] = 0,
    seeds: Annotated[int, typer.Option(help="how many")] = 1,
    rounds: Annotated[int, typer.Option(help="how many")] = 3,
    steps: Annotated[int | None, typer.Option(help="instead of params.yaml's train.steps")] = None,
    tuning: Annotated[bool, typer.Option(help="examine by the tuning prompts")] = False,
    table: Annotated[bool, typer.Option(help="only print what is there")] = False,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="only draw what is there")] = None,
) -> None:
    """Run campaigns, or show them."""
    logging.getLogger("srpo").setLevel(logging.ERROR)
    for name in arm or []:
        if name not in ARMS:
            raise typer.BadParameter(f"no arm {name!r}; there are {', '.join(ARMS)}")
    if plot_to:
        plot(runs, plot_to, arm or [], {name for name, changes in ARMS.items() if not changes})
    elif not table:
        for seed in range(first_seed, first_seed + seeds):
            for name in arm or ["sft"]:
                run(Path.cwd(), runs, name, seed, rounds, steps, tuning)
    if table or not plot_to:
        show(runs)


if __name__ == "__main__":
    typer.run(main)
