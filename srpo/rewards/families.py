"""Reward models by family name. Light to import: a family's own imports come with its first use."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import NamedTuple

from srpo.errors import UserError

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
