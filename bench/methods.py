"""Ways of making rounds compared on the tiny world: the same candidates' budget, several seeds, every round evaluated.

    python -m bench.methods RUNS --arm "preset" --arm "dpo" --seeds 3 --rounds 5 [--tuning]
    python -m bench.methods RUNS --table
    python -m bench.methods RUNS --plot docs/images/frontier.png --arm ...

Run it in the project's folder. RUNS keeps each campaign's files, so a killed run goes on where it was. `--tuning`
examines rounds by 50 prompts that are neither train nor eval prompts: choose settings by those, report the others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.methods_shown import plot, show
from srpo.config.loader import Params, load_params
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.evaluation.gate import best_of_sweep
from srpo.rounds import BASE, Round, RoundFiles
from srpo.storage.hashing import value_digest

# what an arm changes of params.yaml: sections for all rounds, or {"rounds": {number: sections}} for some
ARMS: dict[str, dict[str, Any]] = {
    "preset": {},
    "guided candidates, half as many": {"generate": {"guidance_scale": 1.5, "candidates_per_prompt": 4}},
    "half of the prompts, twice the candidates": {"generate": {"prompts_per_round": 100, "candidates_per_prompt": 16}},
    "twice the prompts, half the candidates": {"generate": {"prompts_per_round": 400, "candidates_per_prompt": 4}},
    "temperature 4": {"select": {"temperature": 4.0}},
    "half of the prompts, by margin": {"select": {"top_fraction": 0.5}},
    "weights by advantage": {"select": {"weighting": "advantage"}},
    "half of the steps": {"train": {"steps": 150}},
    "twice the batch": {"train": {"batch_size": 32}},
    "learning rate 1e-3": {"train": {"learning_rate": 1e-3}},
    "learning rate 1e-3 after round 1": {"rounds": {n: {"train": {"learning_rate": 1e-3}} for n in range(2, 6)}},
    "learning rate 5e-3": {"train": {"learning_rate": 5e-3}},
    "no replay": {"train": {"replay": 0.0}},
    "from base on all winners": {"train": {"start": "base", "replay": 0.0}},
    "weights averaged (EMA .97)": {"train": {"ema_decay": 0.97}},
    "dpo": {"train": {"objective": "dpo", "dpo_beta": 200.0, "steps": 112}},
    "nft": {"train": {"objective": "nft", "steps": 112}},
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
            (folder / "data").symlink_to(_data(project, runs, tuning).resolve())
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
            evaluated = Round.of(params.model_copy(update={"seed": 0}), root, key)
            evaluate(evaluated)
            gate(evaluated)
            _note(root, key)


def _base(params: Params, root: Path, pin_base, evaluate) -> None:
    files = RoundFiles(root, BASE)
    if not (files.folder / "methods.json").exists():
        pin_base(Round.of(params, root, "base"))
        evaluate(Round.of(params, root, BASE))
        _note(root, BASE)


def _note(root: Path, key: str) -> None:
    """What metrics.json says, and what the gate compares: FID and diversity as shares of base's."""
    files = RoundFiles(root, key)
    even = {"fid_ratio": 1.0, "diversity_ratio": 1.0, "passed": 0.0, "judge_win_rate_low": 0.5}
    found = even | best_of_sweep(read_sweep(files), ["accuracy"]) | read_metrics(files)
    if key != BASE:
        record = read_gate(files)
        found["fid_ratio"] = record["rules"]["fid_ratio"]["value"]
        found["diversity_ratio"] = record["rules"]["open_diversity_ratio"]["value"]
        found["passed"] = float(record["verdict"] == "pass")
    (files.folder / "methods.json").write_text(json.dumps(found, indent=1))


def _params(project: Path, arm: str, seed: int, rounds: int, steps: int | None) -> Params:
    params = load_params(project / "params.yaml")
    changes = {name: values for name, values in ARMS[arm].items() if name != "rounds"}
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


def _data(project: Path, runs: Path, tuning: bool) -> Path:
    """data/ of the project, or with `tuning` one whose eval prompts and reference are of captions left for this."""
    if not tuning:
        return project / "data"
    folder = runs / "data"
    if not folder.exists():
        from demo.make import EVAL_PROMPTS, choose_prompts, write_prompts, write_reference

        partial = runs / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "prompts").mkdir(parents=True)
        for item in (project / "data").iterdir():
            if item.name not in ("prompts", "reference"):
                (partial / item.name).symlink_to(item.resolve())
        shutil.copy(project / "data" / "prompts" / "train.jsonl", partial / "prompts")
        _, _, left = choose_prompts()
        held_out = [
            caption
            for kind, number in EVAL_PROMPTS.items()
            for caption in [one for one in left if one.kind == kind][:number]
        ]
        write_prompts(partial / "prompts" / "eval.jsonl", held_out, "tuning")
        write_reference(partial / "reference" / "reference.parquet", held_out, np.random.default_rng(5))
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
            for name in arm or ["preset"]:
                run(Path.cwd(), runs, name, seed, rounds, steps, tuning)
    if table or not plot_to:
        show(runs)


if __name__ == "__main__":
    typer.run(main)
