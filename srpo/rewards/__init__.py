"""Reward models by family name. Light to import: a family's own imports come with its first use."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from srpo.errors import UserError
from srpo.rewards.protocol import FeatureReward, Pixels, Reward

if TYPE_CHECKING:
    import torch

    from srpo.config.schema import RewardParams

log = logging.getLogger("srpo")
ENTRY_POINTS = "srpo.rewards"
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Family(NamedTuple):
    """Where a family's class is, and the published model it stands for."""

    path: str
    model: str | None = None
    revision: str | None = None


FAMILIES = {
    "clip": Family(
        "srpo.rewards.clip:ClipReward", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"
    ),
    "pickscore": Family(
        "srpo.rewards.pickscore:PickScore", "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"
    ),
    "hpsv2": Family("srpo.rewards.hps:HpsV2", "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"),
    "hpsv2.1": Family("srpo.rewards.hps:HpsV21", "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"),
    "imagereward": Family(
        "srpo.rewards.imagereward:ImageReward", "zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"
    ),
    "aesthetic": Family("srpo.rewards.aesthetic:AestheticReward", "camenduru/improved-aesthetic-predictor"),
    "vqascore": Family("srpo.rewards.vqa:VqaScore"),
    "templates": Family("srpo.rewards.templates:TemplateReward"),
}


def find_family(kind: str) -> Family:
    """The family that a `kind` names: built in, `package.module:Class`, or an entry point. Imports nothing of it.

    Raises:
        UserError: there is none; one line that lists what there is.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    if DOTTED.fullmatch(kind):
        return Family(kind)
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    if kind in installed:
        return Family(installed[kind])
    known = ", ".join([*FAMILIES, *sorted(installed)])
    raise UserError(f"unknown reward {kind!r}; choose one of {known}, or write your own as package.module:Class")


def load_reward(spec: RewardParams, root: Path, device: torch.device, dtype: torch.dtype | None = None) -> Reward:
    """The reward model that a section of `rewards` describes, computing in `dtype` (float32 unless given).

    Classes of the user's own are found in `root` as well as among the installed packages.

    Raises:
        UserError: its class or its model can't be loaded.
    """
    import torch

    from srpo.runtime.device import load_quietly

    module, attribute = find_family(spec.kind).path.split(":")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"kind {spec.kind!r} can't be imported: {' '.join(str(error).split()):.200}") from error
    model = spec.model
    if model and (root / model).exists():
        model = str(root / model)
    elif model:
        log.info("loading %s from the Hub's cache or the Hub: %s@%s", spec.kind, model, spec.revision or "main")
    load_quietly()
    return family(model, spec.revision, device, dtype or torch.float32)


__all__ = ["FAMILIES", "Family", "FeatureReward", "Pixels", "Reward", "find_family", "load_reward"]
