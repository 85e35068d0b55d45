"""`srpo fit-reward`: a reward from what people picked and voted for, if it predicts what it has not seen.

Pairwise logistic loss (Bradley and Terry, 1952) of a linear head on CLIP's features. Prompts are held out in turn, so
every decision is predicted by a head that never saw its prompt.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import softplus

from srpo.config.reward_families import FAMILIES
from srpo.data.images import image_size
from srpo.errors import UserError
from srpo.evaluation.bootstrap import Estimate, mean_interval
from srpo.models.hub import Source
from srpo.review.candidates import Images
from srpo.review.preferences import ImageKey, Preference, preferences
from srpo.rewards.batches import BATCH, batched, to_tensor
from srpo.rewards.clip import ClipEncoder
from srpo.rewards.fitted_head import CLIP_FOLDER, RECORD, head_features
from srpo.rounds import Round
from srpo.storage.files import publish
from srpo.storage.hashing import derive_seed
from srpo.storage.json_files import write_json

log = logging.getLogger(__name__)
FOLDS = 4
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # of the squared weights of standardized features
MIN_PROMPTS = 20  # fewer leave too little to learn from and to test on
CHANCE = 0.5


@dataclass(frozen=True)
class Fitted:
    """The folder written, what the head was fitted to, and how it agrees with decisions about held-out prompts."""

    folder: Path
    decisions: int
    prompts: int
    agreement: Estimate
    penalty: float


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of two images, one row each.

    Attributes:
        differences: float64 [n, features], of the preferred image minus the other.
        weights: float64 [n]; those of one decision sum to 1.
        decisions: int [n], number of the decision.
        prompts: of each row.
    """

    differences: torch.Tensor
    weights: torch.Tensor
    decisions: np.ndarray
    prompts: np.ndarray

    def rows(self, mask: np.ndarray) -> Comparisons:
        """Return some of the rows."""
        keep = torch.from_numpy(mask)
        return Comparisons(self.differences[keep], self.weights[keep], self.decisions[mask], self.prompts[mask])


def fit_reward(rounds: Sequence[Round], clip: Source, to: Path, seed: int = 0) -> Fitted:
    """Write a reward folder for `kind: head`, fitted to all decisions about these rounds.

    The folder has `head.safetensors`, `head.json` (what it was fitted to, and its agreement) and, of a local CLIP, a
    copy in `clip/`.

    Args:
        rounds: of one project.
        clip: a checkpoint in transformers' CLIPModel layout.
        to: the folder to write.
        seed: of the division into held-out parts.

    Raises:
        UserError: too few decisions, a CLIP that can't be loaded, or an agreement with held-out decisions that is not
            above chance with its whole interval; nothing is written.
    """
    if to.exists() and not (to / RECORD).exists():
        raise UserError(f"{to}: exists, and fit-reward did not write it; name another folder with --to")
    found = list(preferences(rounds))
    texts = {preference.prompt for preference in found}
    if len(texts) < MIN_PROMPTS:
        raise UserError(
            f"review/: decisions about {len(texts)} prompts of {', '.join(round.key for round in rounds)}; at least"
            f" {MIN_PROMPTS} are needed, better 100: `srpo review` is the page for them"
        )
    encoder = ClipEncoder.load(clip, torch.device("cpu"), torch.float32)
    features = _features(encoder, found)
    mean = torch.stack(list(features.values())).mean(dim=0)
    scale = torch.stack(list(features.values())).std(dim=0).clamp_min(1e-6)
    comparisons = _compare(found, features, scale)
    agreement = held_out_agreement(comparisons, seed)
    if agreement.low <= CHANCE:
        raise UserError(
            f"fit-reward: on held-out prompts the head agrees with {agreement.value:.2f} ({agreement.low:.2f} to"
            f" {agreement.high:.2f}) of the comparisons, which is not above chance, {CHANCE}; nothing is written."
            " Decide about more prompts, or take another CLIP"
        )
    penalty = _best_penalty(comparisons, seed)
    weight = fit(comparisons, penalty) / scale
    record = {
        "clip": clip._asdict(),
        "rounds": [round.key for round in rounds],
        "decisions": len(found),
        "prompts": len(texts),
        "held_out_agreement": agreement._asdict(),
        "penalty": penalty,
    }
    _write(to, weight, mean, clip, record)
    return Fitted(to, len(found), len(texts), agreement, penalty)


def held_out_agreement(comparisons: Comparisons, seed: int) -> Estimate:
    """Return the agreement with decisions about prompts that the head has not seen, with the interval over prompts.

    A decision's agreement is the share of the images it was chosen over that score lower; chance is 0.5. The penalty
    is chosen anew for each held-out part, without looking at it.
    """
    agreed = np.zeros(len(comparisons.prompts))
    parts = _parts(comparisons.prompts, seed)
    for part in range(FOLDS):
        held_out = parts == part
        if held_out.any():
            known = comparisons.rows(~held_out)
            weight = fit(known, _best_penalty(known, seed + 1))
            agreed[held_out] = 0.5 + 0.5 * torch.sign(comparisons.rows(held_out).differences @ weight).numpy()
    _, first = np.unique(comparisons.decisions, return_index=True)
    values = np.bincount(comparisons.decisions, weights=agreed * comparisons.weights.numpy())
    return mean_interval(values, comparisons.prompts[first])


def fit(comparisons: Comparisons, penalty: float) -> torch.Tensor:
    """Return the weights, float64 [features], of least mean log(1 + exp(-w . difference)) + penalty / 2 |w|^2.

    The problem is convex: the result depends on the comparisons alone.
    """
    weight = torch.zeros(comparisons.differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = _log_loss(comparisons, weight) + penalty / 2 * (weight**2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach()


def _log_loss(comparisons: Comparisons, weight: torch.Tensor) -> torch.Tensor:
    losses = softplus(-(comparisons.differences @ weight))
    return (losses * comparisons.weights).sum() / comparisons.weights.sum()


def _best_penalty(comparisons: Comparisons, seed: int) -> float:
    """Return the penalty of least log loss on prompts held out in turn."""
    parts = _parts(comparisons.prompts, seed)

    def loss(penalty: float) -> float:
        total = 0.0
        for part in range(FOLDS):
            held_out = parts == part
            if held_out.any() and not held_out.all():
                weight, unseen = fit(comparisons.rows(~held_out), penalty), comparisons.rows(held_out)
                total += float(_log_loss(unseen, weight) * unseen.weights.sum())
        return total

    return min(PENALTIES, key=loss)


def _parts(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return the held-out part of each row, 0 to FOLDS - 1: that of its prompt; parts are of nearly equal size."""
    order = sorted(set(prompts), key=lambda prompt: derive_seed(seed, "held out", prompt))
    part = {prompt: number % FOLDS for number, prompt in enumerate(order)}
    return np.array([part[prompt] for prompt in prompts])


def _features(encoder: ClipEncoder, found: Sequence[Preference]) -> dict[tuple[ImageKey, str], torch.Tensor]:
    """Return the features of each image with its prompt, float64 [features]."""
    wanted: dict[Path, dict[tuple[int, str], None]] = {}
    for one in found:
        for path, place in (one.chosen, *one.others):
            wanted.setdefault(path, {})[place, one.prompt] = None
    features: dict[tuple[ImageKey, str], torch.Tensor] = {}
    for path, keys in wanted.items():
        images = Images(path)
        for part in batched(keys, BATCH):
            sizes: dict[tuple[int, int], dict[tuple[int, str], dict[str, Any]]] = {}
            for key in part:
                cell = {"bytes": images.bytes_at(key[0])}
                sizes.setdefault(image_size(cell), {})[key] = cell
            for cells in sizes.values():
                values = head_features(encoder, to_tensor(cells.values()), [prompt for _, prompt in cells]).double()
                features |= {((path, place), text): row for (place, text), row in zip(cells, values, strict=True)}
    return features


def _compare(
    found: Sequence[Preference], features: dict[tuple[ImageKey, str], torch.Tensor], scale: torch.Tensor
) -> Comparisons:
    rows = [(number, one, other) for number, one in enumerate(found) for other in one.others]
    differences = [features[one.chosen, one.prompt] - features[other, one.prompt] for _, one, other in rows]
    return Comparisons(
        differences=torch.stack(differences) / scale,
        weights=torch.tensor([1 / len(one.others) for _, one, _ in rows], dtype=torch.float64),
        decisions=np.array([number for number, _, _ in rows]),
        prompts=np.array([one.prompt for _, one, _ in rows]),
    )


def _write(folder: Path, weight: torch.Tensor, mean: torch.Tensor, clip: Source, record: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({"weight": weight.float(), "mean": mean.float()}, scratch / FAMILIES["head"].file)
    write_json(scratch / RECORD, record)
    if Path(clip.model).is_dir():
        shutil.copytree(clip.model, scratch / CLIP_FOLDER)
    publish(scratch, folder)
    shutil.rmtree(scratch.with_name(f"{scratch.name}.replaced"), ignore_errors=True)
