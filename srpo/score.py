"""Stage `score`: every reward model on every candidate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from srpo import datasets
from srpo.device import pick_device
from srpo.params import Params
from srpo.rewards import Reward, load_reward
from srpo.rounds import RoundFiles

log = logging.getLogger("srpo")

# Scores may depend on the batch in the last bit, so its size is fixed here rather than set by hardware.
BATCH = 64


def score(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/scores.parquet`: one row a candidate, one float32 column a reward, raw units.

    Raises:
        UserError: candidates are missing or damaged, or a reward can't be loaded.
    """
    files = RoundFiles(root, key)
    rewards = load_rewards(params, root)
    rows: list[dict[str, Any]] = []
    columns = ["candidate_id", "prompt_id", "prompt", "index", "image"]
    with tqdm(unit="img", desc=f"score {key}", mininterval=2) as progress:
        for batch in batched(datasets.read_rows(files.candidates, columns), BATCH):
            scores = score_batch(rewards, [row["image"] for row in batch], [row["prompt"] for row in batch])
            for i, row in enumerate(batch):
                values = {name: scores[name][i].item() for name in rewards}
                rows.append({name: row[name] for name in ("candidate_id", "prompt_id", "index")} | values)
            progress.update(len(batch))
    fields = {"candidate_id": pa.string(), "prompt_id": pa.string(), "index": pa.int32()}
    datasets.write_table(files.scores, rows, fields | dict.fromkeys(rewards, pa.float32()))
    log.info("score %s: %d candidates, rewards %s", key, len(rows), ", ".join(rewards))


def load_rewards(params: Params, root: Path) -> dict[str, Reward]:
    """All reward models of the params, by name."""
    device = pick_device(params.runtime)
    return {name: load_reward(spec, root, device) for name, spec in params.rewards.items()}


def score_batch(
    rewards: Mapping[str, Reward], cells: Sequence[Mapping[str, Any]], prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """float32 [n] per reward name, for n image cells and their prompts."""
    images = to_tensor(cells)
    return {name: reward.score(images, prompts) for name, reward in rewards.items()}


def to_tensor(cells: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """uint8 [n, 3, height, width] from image cells of one size."""
    return torch.from_numpy(datasets.pixels(cells)).permute(0, 3, 1, 2).contiguous()


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
