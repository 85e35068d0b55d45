"""The table of reward families. Importing it imports no reward model."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import NamedTuple

from srpo.errors import UserError

ENTRY_POINTS = "srpo.rewards"
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Companion(NamedTuple):
    """A second repository that a family loads from when its model is on the Hub, and the file it needs there."""

    model: str
    revision: str
    file: str


class Family(NamedTuple):
    """A reward family.

    Attributes:
        path: its class, as `module:Class`.
        model: Hub id of the published model, the default of `rewards.<name>.model`.
        revision: commit of that model.
        file: the file that every copy of the model has, in a folder or on the Hub; empty if there is none.
        companion: what it loads besides, unless the model is a local one.
    """

    path: str
    model: str | None = None
    revision: str | None = None
    file: str = ""
    companion: Companion | None = None


CLIP_L = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H_TOKENIZER = Companion(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c", "vocab.json"
)
BERT_TOKENIZER = Companion("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt")
CLIP_L_ENCODER = Companion(*CLIP_L, "model.safetensors")
HPS = ("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")

FAMILIES = {
    "clip": Family("srpo.rewards.clip:ClipReward", *CLIP_L, "model.safetensors"),
    "pickscore": Family(
        "srpo.rewards.pickscore:PickScore",
        "yuvalkirstain/PickScore_v1",
        "a4e4367c6dfa7288a00c550414478f865b875800",
        "model.safetensors",
    ),
    "hpsv2": Family("srpo.rewards.hps:HpsV2", *HPS, "HPS_v2_compressed.pt", CLIP_H_TOKENIZER),
    "hpsv2.1": Family("srpo.rewards.hps:HpsV21", *HPS, "HPS_v2.1_compressed.pt", CLIP_H_TOKENIZER),
    "imagereward": Family(
        "srpo.rewards.imagereward:ImageReward",
        "zai-org/ImageReward",
        "5736be03b2652728fb87788c9797b0570450ab72",
        "ImageReward.pt",
        BERT_TOKENIZER,
    ),
    "aesthetic": Family(
        "srpo.rewards.aesthetic:AestheticReward",
        "camenduru/improved-aesthetic-predictor",
        file="sac+logos+ava1-l14-linearMSE.pth",
        companion=CLIP_L_ENCODER,
    ),
    "head": Family("srpo.rewards.fitted_head:FittedHead", file="head.safetensors"),
    "vqascore": Family("srpo.rewards.vqa:VqaScore", file="config.json"),
    "templates": Family("srpo.rewards.templates:TemplateReward"),
}


def find_family(kind: str) -> Family:
    """Return the family of a `kind`: built in, `package.module:Class`, or an entry point. Imports nothing of it.

    Raises:
        UserError: there is no such family; the line lists those that there are.
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
