"""Loading of reward models."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from srpo.config.loader import Params
from srpo.config.reward_families import FAMILIES, find_family
from srpo.config.schema import RewardParams, RuntimeParams
from srpo.errors import UserError, one_line
from srpo.lineage.record import check_pinned
from srpo.models.hub import hide_loading_bars
from srpo.rewards.offloaded import OffloadedReward
from srpo.rewards.protocol import Reward
from srpo.rewards.validated import ValidatedReward, reward_errors
from srpo.rounds import BASE, RoundFiles
from srpo.runtime import distributed
from srpo.runtime.device import pick_device, pick_reward_dtype
from srpo.runtime.turns import TURNS
from srpo.storage.hashing import file_digest

log = logging.getLogger(__name__)


def load_rewards(specs: Mapping[str, RewardParams], runtime: RuntimeParams, root: Path) -> dict[str, ValidatedReward]:
    """Load the reward models of these sections, by name.

    Raises:
        UserError: one can't be loaded; the line names it.
    """
    device = pick_device(runtime)
    dtype = pick_reward_dtype(runtime, device)
    rewards: dict[str, ValidatedReward] = {}
    if runtime.offload:
        TURNS.bring([], device)
    for name, spec in specs.items():
        with reward_errors(name, "loading"):
            reward = load_reward(spec, root, device, dtype)
            rewards[name] = OffloadedReward(name, reward, device) if runtime.offload else ValidatedReward(name, reward)
    return rewards


def load_pinned_rewards(params: Params, root: Path) -> dict[str, ValidatedReward]:
    """Load all reward models of a project as stage `base` recorded them.

    A worker does not compare them with the record: the process that started it has called `check_rewards`.

    Raises:
        UserError: one can't be loaded, or differs from what stage `base` recorded.
    """
    if not distributed.is_worker():
        check_rewards(params.rewards, root)
    return load_rewards(params.rewards, params.runtime, root)


def check_rewards(names: Iterable[str], root: Path) -> None:
    """Compare these reward models with what stage `base` recorded.

    Raises:
        UserError: one has changed.
    """
    for name in names:
        check_pinned(root, RoundFiles(root, BASE).rewards, name, f"rewards.{name}.model")


def reward_code(spec: RewardParams, root: Path) -> str | None:
    """Return the sha256 of the module of a user's own reward class; None for a built-in family, or if there is no file.

    What a stage keeps after an interruption depends on it: the class may have been corrected since.
    """
    if spec.kind in FAMILIES:
        return None
    _add_to_path(root)
    try:
        found = importlib.util.find_spec(find_family(spec.kind).path.split(":")[0])
    except (ImportError, ValueError):
        return None
    return file_digest(Path(found.origin)) if found and found.origin and Path(found.origin).is_file() else None


def load_reward(spec: RewardParams, root: Path, device: torch.device, dtype: torch.dtype | None = None) -> Reward:
    """Load one reward model; it computes in `dtype`, float32 unless given.

    Users' own classes are looked up in `root` and among the installed packages.

    Raises:
        UserError: its class or its model can't be loaded.
    """
    module, attribute = find_family(spec.kind).path.split(":")
    _add_to_path(root)
    try:
        family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"kind {spec.kind!r} can't be imported: {one_line(error):.200}") from error
    model = spec.model
    if model and (root / model).exists():
        model = str(root / model)
    elif model and ":" not in spec.kind:  # what `model` means to a class of one's own is not known
        log.info("loading %s from the Hub's cache or the Hub: %s@%s", spec.kind, model, spec.revision or "main")
    hide_loading_bars()
    return family(model, spec.revision, device, dtype or torch.float32)


def _add_to_path(root: Path) -> None:
    if str(root) not in sys.path:
        sys.path.append(str(root))
