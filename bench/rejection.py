"""Early rejection: what every setting would have lost and saved, from one round whose candidates were all finished.

    python -m bench.rejection ROUND [--candidates 8 16 32]

Run it in the folder of a project whose round was generated with `audit_fraction: 1.0`, many candidates per prompt and a
checkpoint at every step of interest, and scored. The first n candidates of each prompt stand for a round of n.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.data.scores import read_scores
from srpo.rounds import RoundFiles
from srpo.selection.audit import survivors

SHARES = (0.125, 0.25, 0.375, 0.5)


def simulate(
    previews: np.ndarray, finals: np.ndarray, points: list[tuple[int, int, int]], steps: int
) -> dict[str, float]:
    """What these checkpoints do.

    Args:
        previews: scores [prompts, candidates, checkpoints].
        finals: final scores [prompts, candidates].
        points: (column of `previews`, its step, how many go on).
        steps: of a whole way.
    """
    best, left, count = finals.max(1), np.empty(len(finals)), finals.shape[1]
    for row in range(len(finals)):
        alive = list(range(count))
        for column, _, keep in points:
            alive = [alive[i] for i in survivors(previews[row, alive, column].tolist(), keep)]
        left[row] = finals[row, alive].max()
    done, running, at = 0, count, 0
    for _, step, keep in points:
        done, running, at = done + running * (step - at), keep, step
    done += running * (steps - at)
    gain, regret = (best - finals.mean(1)).mean(), (best - left).mean()
    return {
        "fewer": count * steps / done,
        "regret": regret,
        "share": regret / gain,
        "same": float((best == left).mean()),
    }


def settings(count: int, steps: list[int]) -> list[list[tuple[int, int, int]]]:
    """One and two checkpoints, with the keeps that SHARES give."""
    keeps = sorted({max(1, round(count * share)) for share in SHARES})
    one = [[(column, step, keep)] for (column, step), keep in product(enumerate(steps), keeps)]
    two = [[a[0], b[0]] for a, b in product(one, one) if a[0][1] < b[0][1] and a[0][2] > b[0][2]]
    return one + two


def _beats(other: dict[str, float], one: dict[str, float]) -> bool:
    pairs = ((other["fewer"], one["fewer"]), (-other["share"], -one["share"]))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def main() -> None:
    """Print, for each number of candidates, the settings that no other beats at both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("round")
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32])
    arguments = parser.parse_args()
    params, files = load_params(), RoundFiles(Path.cwd(), arguments.round)
    generate = params.for_round(arguments.round).generate
    rules, total = generate.early_rejection, generate.num_inference_steps
    found = pl.scan_parquet(parquet.shards(files.candidates)).select(
        "candidate_id", "prompt_id", "index", "preview_scores"
    )
    scores = read_scores(files.scores, {rules.reward: "select"}).select("candidate_id", rules.reward)
    table = found.collect().join(scores, on="candidate_id").sort("prompt_id", "index")
    shape = (table["prompt_id"].n_unique(), generate.candidates_per_prompt)
    finals = table[rules.reward].to_numpy().astype(float).reshape(shape)
    previews = np.array(table["preview_scores"].to_list()).reshape(*shape, -1)
    steps = [point.step for point in rules.checkpoints]
    for column, step in enumerate(steps):
        ranks = [previews[..., column].argsort(1).argsort(1), finals.argsort(1).argsort(1)]
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])
        print(f"after step {step:2} of {total}: rank correlation with the final score {r:.3f}")
    for count in arguments.candidates:
        rows = [
            (points, simulate(previews[:, :count], finals[:, :count], points, total))
            for points in settings(count, steps)
        ]
        shown = Table(title=f"{count} candidates of {shape[0]} prompts, {total} steps")
        for name in ("step: keep", "UNet evaluations, times fewer", "regret", "of best-of-N gain", "same best"):
            shown.add_column(name, justify="right")
        for points, r in sorted(rows, key=lambda row: row[1]["fewer"]):
            if not any(_beats(other, r) for _, other in rows):
                name = ", ".join(f"{step}: {keep}" for _, step, keep in points)
                shown.add_row(name, f"{r['fewer']:.2f}", f"{r['regret']:.3f}", f"{r['share']:.1%}", f"{r['same']:.0%}")
        Console(width=110).print(shown)


if __name__ == "__main__":
    main()
