"""A finished campaign on disk, drawn by NumPy: what report and tracking read, without a model or torch.

Files go through the project's own writers (`srpo.data.parquet`, `select`, the gate), so their form is the real one.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from srpo.config.loader import STAGES_WITH_OVERRIDES, Params, load_params
from srpo.config.tree import ancestors
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.metric_keys import IMAGE_STATS
from srpo.data.records import read_sweep
from srpo.data.schemas import CANDIDATE_FIELDS, IMAGE, SCORE_FIELDS, arrow_schema, with_rewards
from srpo.data.scores import invalid_path, score_path, write_scores
from srpo.evaluation.bootstrap import Estimate
from srpo.evaluation.gate import best_guidance, image_stat_shifts, judge_round
from srpo.lineage.record import WEIGHTS_FILE, read_lineage
from srpo.rounds import BASE, Round, RoundFiles
from srpo.stages.select import select
from srpo.storage.hashing import derive_seed, digest, dvc_digest, file_digest
from srpo.storage.json_files import write_json

REPO = Path(__file__).parents[2]
PROMPTS = ["<script>alert(1)</script> & co", "a red circle", "a green square", "مرحبا 🎈", "a blue circle, " * 9]
CANDIDATES = 4


def build_campaign(root: Path, rounds: tuple[str, ...] = ("001", "002"), size: int = 16) -> Params:
    """Write params.yaml, dvc.lock and rounds/ under `root`: base and the given rounds, up to their evaluation.

    The tree has 001, its child 002, and 002b, a branch beside 002. Reports are left to `srpo.stages.report`.

    Args:
        rounds: which of the tree have run.
        size: pixels of an image's side.
    """
    root.mkdir(parents=True, exist_ok=True)
    params = _write_params(root)
    for path, name in ((params.prompts.train, "train"), (params.prompts.eval, "eval")):
        lines = [json.dumps({"id": f"{name}-{i:04d}", "prompt": f"{name}: {text}"}) for i, text in enumerate(PROMPTS)]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    lineage = {"base": {"source": "data/base", "revision": None, "digest": "ba" * 32}}
    write_json(RoundFiles(root, BASE).adapter / "lineage.json", lineage)
    write_evaluation(params, root, BASE, size)
    for key in rounds:
        _write_candidates(params, root, key, size)
        select(Round.of(params, root, key))
        write_training(params, root, key)
        write_evaluation(params, root, key, size)
    write_dvc_lock(params, root, rounds)
    return params


def write_training(params: Params, root: Path, key: str, steps: int = 30) -> list[dict[str, float]]:
    """Write adapter/ and training.csv of a round; returns the rows of the curve, steps from 1."""
    files, parent = RoundFiles(root, key), params.rounds[key].parent
    files.adapter.mkdir(parents=True, exist_ok=True)
    weights = {"unet.to_q.lora_A.weight": _generator(key, steps).normal(size=(1, 2)).astype(np.float32)}
    save_file(weights, files.adapter / WEIGHTS_FILE)
    parent_weights = RoundFiles(root, parent).adapter / WEIGHTS_FILE
    resolved = params.for_round(key)
    lineage = {
        "round": key,
        "parent": parent,
        "base": read_lineage(RoundFiles(root, BASE))["base"],
        "parent_adapter": None if parent == BASE else file_digest(parent_weights),
        "winners": digest(files.winners),
        "adapter": file_digest(files.adapter / WEIGHTS_FILE),
        "params": {stage: getattr(resolved, stage).model_dump() for stage in STAGES_WITH_OVERRIDES},
        "code": "c0" * 32,
        "versions": {"torch": "2.15.0"},
    }
    write_json(files.adapter / "lineage.json", lineage)
    noise = _generator(key, "training").normal(0, 0.02, steps)
    rows = [
        {"step": i + 1, "loss": 0.1 + 0.3 / (i + 2) + abs(noise[i]), "learning_rate": 1e-3, "grad_norm": 0.5}
        for i in range(steps)
    ]
    with files.training.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def write_evaluation(params: Params, root: Path, key: str, size: int = 16, shift: float = 0.0) -> None:
    """Write evaluation/ of a round or of base: deeper rounds score better; `shift` is added to every reward."""
    files, settings = RoundFiles(root, key), params.evaluate
    depth = _depth(params, key)
    sweep = {}
    for guidance in settings.guidance_scales:
        gain = 0.1 * depth + 0.03 * guidance + shift
        values = {name: 0.3 + gain + 0.02 * i for i, name in enumerate(params.rewards)}
        values |= {"kid": 0.3 - 0.4 * gain, "cmmd": 2 - gain, "diversity": 0.5 - 0.1 * gain}
        spreads = {name: Estimate(value, value - 0.05, value + 0.05).flat(name) for name, value in values.items()}
        sweep[str(guidance)] = {"images": 180, "fid": 40 - 60 * gain} | {
            k: v for s in spreads.values() for k, v in s.items()
        }
        sweep[str(guidance)] |= dict.fromkeys(IMAGE_STATS, 0.4 + 0.1 * gain) | {
            f"{name}_std": 0.1 for name in IMAGE_STATS
        }
    names = ["images", *params.rewards, "fid", "kid", "cmmd", "diversity"]
    metrics = {"guidance": settings.guidance_scale}
    metrics |= {name: sweep[str(settings.guidance_scale)][name] for name in names}
    metrics |= {"drift": 5.0 * depth, "drift_kid": 0.05 * depth, "verdict": "-", "finding": "-"}
    if key != BASE:
        base, win = (
            read_sweep(RoundFiles(root, BASE)),
            Estimate(0.5 + 0.1 * depth, 0.45 + 0.1 * depth, 0.55 + 0.1 * depth),
        )
        roles = (dict.fromkeys(params.reward_names(role), win) for role in ("judge", "select"))
        gate = judge_round(params.gate, sweep, base, *roles)
        best = win._asdict() | {"guidance": 1.5, "base_guidance": 3.0}
        gate["best_fid"] = {"guidance": float(best_guidance(sweep, "fid")), "base_guidance": 3.0}
        gate["win_rate"] = {
            name: {"best": best, "base": win._asdict(), "parent": win._asdict(), "parent_best": best}
            for name in params.rewards
        }
        write_json(files.evaluation / "gate.json", gate | {"image_stats": image_stat_shifts(sweep, base)})
        for judge in params.reward_names("judge"):
            metrics |= {f"{judge}_win_rate": win.value, f"{judge}_win_rate_low": win.low}
            metrics[f"{judge}_win_rate_parent"] = win.value
        metrics |= {"verdict": gate["verdict"], "finding": gate["finding"] or "-"}
    write_json(files.evaluation / "metrics.json", metrics)
    with (files.evaluation / "guidance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["guidance", *next(iter(sweep.values()))])
        writer.writeheader()
        writer.writerows({"guidance": guidance} | values for guidance, values in sweep.items())
    places = [(i, index) for i in range(len(PROMPTS)) for index in range(2)]
    fields = {"prompt_id": pa.string(), "prompt": pa.string(), "index": pa.int32()}
    known = [{"prompt_id": f"eval-{i:04d}", "prompt": PROMPTS[i], "index": index} for i, index in places]
    samples = [row | {"image": _image(i, 0.2 + 0.3 * depth, size, "eval", index)} for row, (i, index)
               in zip(known, places, strict=True)]  # fmt: skip
    parquet.write_table(files.evaluation / "samples.parquet", samples, fields | {"image": IMAGE})
    scores = [row | {"guidance": float(guidance)} | {name: values[name] for name in params.rewards}
              for guidance, values in sweep.items() for row in known]  # fmt: skip
    fields |= dict.fromkeys(("guidance", *params.rewards), pa.float32())
    parquet.write_table(files.evaluation / "per_prompt.parquet", scores, fields)


def _write_params(root: Path) -> Params:
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load((REPO / "params.yaml").read_text(encoding="utf-8"))
    nothing = {"generate": {}, "select": {}, "train": {}}
    parents = {"001": BASE, "002": "001", "002b": "001"}
    raw["rounds"] = {key: {"parent": parent} | nothing for key, parent in parents.items()}
    raw["rounds"]["002b"]["select"] = {"top_fraction": 0.5}
    raw["rewards"]["accuracy"] = {"kind": "templates", "model": "data/templates.parquet", "role": "judge"}
    raw["evaluate"] |= {"diversity_judge": None, "guidance_scales": [1.0, 1.5, 2.0, 3.0], "guidance_scale": 2.0}
    raw["gate"] |= {"min_judge_win_rate": 0.4, "min_diversity_ratio": 0.1}
    raw["tracking"] = {"uri": "sqlite:///mlflow.db", "experiment": "srpo", "campaign": "tiny"}
    write_json(root / "params.yaml", raw)  # JSON is YAML, and keeps the order of keys
    return load_params(root / "params.yaml")


def _write_candidates(params: Params, root: Path, key: str, size: int) -> None:
    files, rows, scores = RoundFiles(root, key), [], []
    for i, prompt in enumerate(PROMPTS):
        for index in range(CANDIDATES):
            quality = float(_generator(key, i, index).random())
            identity = {"candidate_id": f"train-{i:04d}-{index}", "prompt_id": f"train-{i:04d}", "index": index}
            rows.append(
                identity
                | {"prompt": prompt, "seed": index, "image": _image(i, quality, size, key, index)}
                | {"latents": bytes(8), "latents_shape": [1, 2, 2], "steps": 12, "guidance": 3.0}
            )
            judged = {name: quality - 0.1 * j * quality**2 for j, name in enumerate(params.rewards)}
            scores.append(identity | judged | {"invalid": False})
    for number, start in enumerate(range(0, len(rows), 2 * CANDIDATES)):
        shard = files.candidates / f"shard-{number:05d}.parquet"
        parquet.write_table(shard, rows[start : start + 2 * CANDIDATES], CANDIDATE_FIELDS)
    write_score_files(params, files, scores)


def write_score_files(params: Params, files: RoundFiles, rows: list[dict]) -> None:
    """Write scores/ from rows with the candidates' identity, every reward and `invalid`."""
    table = pa.Table.from_pylist(rows, schema=arrow_schema(with_rewards(SCORE_FIELDS, params.rewards)))
    for name, spec in params.rewards.items():
        write_scores(score_path(files.scores, name, spec.role), name, [table], "test")
    write_scores(invalid_path(files.scores), "invalid", [table], "test")


def write_dvc_lock(params: Params, root: Path, rounds: tuple[str, ...]) -> None:
    """Write dvc.lock as `dvc repro` would have: what each stage of these rounds read and wrote, as it is on disk."""
    stages = {}
    for key in rounds:
        folder, parent = f"rounds/{key}", f"rounds/{params.rounds[key].parent}/adapter"
        candidates, scores, winners = (f"{folder}/{name}" for name in ("candidates", "scores/select", "winners"))
        adapter, sweep = f"{folder}/adapter", f"{folder}/evaluation/guidance.csv"
        gate = f"{folder}/evaluation/gate.json"
        sides = {
            "generate": ([params.prompts.train, parent], [candidates]),
            "score": ([candidates], [scores]),
            "select": ([candidates, scores], [winners]),
            "train": ([winners, parent], [adapter]),
            "evaluate": ([adapter], [sweep]),
            "gate": ([sweep], [gate]),
        }
        for stage, (deps, outs) in sides.items():
            stages[f"{stage}@{key}"] = {
                side: [{"path": path, "hash": "md5", "md5": dvc_digest(root / path)} for path in paths]
                for side, paths in (("deps", deps), ("outs", outs))
            }
    write_json(root / "dvc.lock", {"schema": "2.0", "stages": stages})


def _image(prompt: int, quality: float, size: int, *seed: str | int) -> dict:
    """A colored disc (even prompts) or square in noise: the better, the clearer."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    shape = (x**2 + y**2 < 0.5) if prompt % 2 == 0 else np.maximum(abs(x), abs(y)) < 0.6
    color = np.array([(220, 60, 50), (60, 160, 80), (60, 90, 210)][prompt % 3])
    clean = np.where(shape[..., None], color, 240)
    noise = _generator(prompt, *seed).integers(0, 255, (size, size, 3))
    quality = min(1.0, quality)
    return encode_image((quality * clean + (1 - quality) * noise).astype(np.uint8))


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*parts))


def _depth(params: Params, key: str) -> int:
    return 0 if key == BASE else len(ancestors(params.rounds, key)) + 1
