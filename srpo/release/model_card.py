"""The model card of an export: a README.md in the Hub's form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.config.loader import Params
from srpo.data.metric_keys import IMAGE_STATS
from srpo.data.prompts import load_prompts
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.lineage.identity import HUB_ID
from srpo.lineage.record import read_lineage
from srpo.reporting.table import SET_MEASURES, show, verdict
from srpo.rounds import BASE, Round

LOWER_IS_BETTER = ("fid", "kid", "cmmd")


@dataclass(frozen=True)
class Licence:
    """A licence: its id on the Hub, its name, where its text is, and the uses that it forbids."""

    id: str
    name: str
    link: str | None = None
    restrictions: tuple[str, ...] = ()


# Attachment A of the licence that Stable Diffusion XL base 1.0 is under; every derivative has to pass these on
OPENRAIL = Licence(
    id="openrail++",
    name="CreativeML Open RAIL++-M License of July 26, 2023",
    link="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    restrictions=(
        "In any way that violates any applicable national, federal, state, local or international law or regulation;",
        "For the purpose of exploiting, harming or attempting to exploit or harm minors in any way;",
        "To generate or disseminate verifiably false information and/or content with the purpose of harming others;",
        "To generate or disseminate personal identifiable information that can be used to harm an individual;",
        "To defame, disparage or otherwise harass others;",
        "For fully automated decision making that adversely impacts an individual's legal rights or otherwise creates "
        "or modifies a binding, enforceable obligation;",
        "For any use intended to or which has the effect of discriminating against or harming individuals or groups "
        "based on online or offline social behavior or known or predicted personal or personality characteristics;",
        "To exploit any of the vulnerabilities of a specific group of persons based on their age, social, physical or "
        "mental characteristics, in order to materially distort the behavior of a person pertaining to that group in "
        "a manner that causes or is likely to cause that person or another person physical or psychological harm;",
        "For any use intended to or which has the effect of discriminating against individuals or groups based on "
        "legally protected characteristics or categories;",
        "To provide medical advice and medical results interpretation;",
        "To generate or disseminate information for the purpose to be used for administration of justice, law "
        "enforcement, immigration or asylum processes, such as predicting an individual will commit fraud/crime "
        "commitment (e.g. by text profiling, drawing causal relationships between assertions made in documents, "
        "indiscriminate and arbitrarily-targeted use).",
    ),
)
UNKNOWN = Licence(id="other", name="the base model's licence")
LICENCES = {"stabilityai/stable-diffusion-xl-base-1.0": OPENRAIL}


def licence_of(base: str) -> Licence:
    """The licence a derivative of this base model is under; `UNKNOWN` where this project does not know."""
    return LICENCES.get(base, UNKNOWN)


def render_card(round: Round, files: dict[str, str], pictures: Sequence[tuple[str, str]]) -> str:
    """The card of a round's export: YAML front matter for the Hub, then Markdown.

    Args:
        files: what the export holds, by kind: any of `diffusers`, `kohya`, `merged`, each a path in the export.
        pictures: (path in the export, prompt) of the example pictures.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    lineage = read_lineage(round.files)
    source = lineage["base"]["source"]
    licence, on_hub = licence_of(source), lineage["base"]["digest"] is None and bool(HUB_ID.fullmatch(source))
    data = ModelCardData(
        license=licence.id,
        license_name="base-models-licence" if licence is UNKNOWN else None,
        base_model=source if on_hub else None,
        base_model_relation=("adapter" if "diffusers" in files else "finetune") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion-xl", "text-to-image", "srpo", *(["lora"] if "diffusers" in files else [])],
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in pictures],
    )
    environment = Environment(
        loader=PackageLoader("srpo.release"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "show": show}
    body = environment.get_template("model_card.md").render(
        name=f"{round.params.tracking.campaign}-{round.key}",
        round=round.key,
        path=[BASE, *round.ancestors, round.key],
        base=lineage["base"],
        on_hub=on_hub,
        licence=licence,
        files=files,
        pictures=pictures,
        params=round.params,
        rewards={role: _models(round.params, role) for role in ("select", "judge")},
        train_prompts=_count(round.root, round.params.prompts.train),
        eval_prompts=_count(round.root, round.params.prompts.eval),
        measures=_measures(round),
        gate=read_gate(round.files),
        verdict=verdict(read_metrics(round.files)),
        hashes=_hashes(round.root, round.key, lineage),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def cell(text: Any) -> str:
    """Other people's text as one cell of a Markdown table: no markup and no HTML of theirs comes through."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", " ".join(str(text).split()))


def _measures(round: Round) -> list[dict[str, str]]:
    """Rows of the evaluation table: name, role, better, base, round; values with their 95 % intervals."""
    ours, theirs = read_sweep(round.files), read_sweep(round.base_files)
    guidance = str(read_metrics(round.files)["guidance"])
    rows = []
    for name in (*round.params.rewards, *SET_MEASURES, *IMAGE_STATS):
        if name not in ours[guidance]:
            continue
        role = (
            {"select": "chose the winners", "judge": "judge"}[round.params.rewards[name].role]
            if name in round.params.rewards
            else ""
        )
        better = "lower" if name in LOWER_IS_BETTER else "higher" if name in round.params.rewards else ""
        values = {"base": _interval(theirs[guidance], name), "round": _interval(ours[guidance], name)}
        rows.append({"name": name, "role": role, "better": better} | values)
    for name, rates in read_gate(round.files)["win_rate"].items():
        best = rates["best"]
        told = {"name": f"{name}: win rate over base, each at its best guidance", "role": "", "better": "higher"}
        rows.append(told | {"base": "0.5", "round": _spread(best["value"], best["low"], best["high"])})
    return rows


def _interval(values: dict[str, float], name: str) -> str:
    return _spread(values[name], values.get(f"{name}_low"), values.get(f"{name}_high"))


def _spread(value: float, low: float | None, high: float | None) -> str:
    return show(value) if low is None or high is None else f"{show(value)} ({show(low)} to {show(high)})"


def _models(params: Params, role: str) -> dict[str, str]:
    specs = {name: params.rewards[name] for name in params.reward_names(role)}
    return {
        name: " ".join(filter(None, (spec.kind, spec.model, spec.revision and f"at {spec.revision}")))
        for name, spec in specs.items()
    }


def _count(root: Path, path: str) -> int | None:
    return len(load_prompts(root / path)) if (root / path).exists() else None


def _hashes(root: Path, key: str, lineage: dict[str, Any]) -> dict[str, str]:
    """By name: sha256 as lineage.json tells them, and DVC's hashes of this round's outputs."""
    from srpo.tracking.records import round_hashes

    known = {name: lineage[name] for name in ("adapter", "parent_adapter", "winners", "code") if lineage[name]}
    found = {f"{name.replace('_', ' ')} (sha256)": value for name, value in known.items()}
    return found | {f"{name} (DVC)": value for name, value in round_hashes(root, key).items()}
