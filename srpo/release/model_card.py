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
from srpo.lineage.dvc_lock import round_hashes
from srpo.lineage.identity import HUB_ID
from srpo.lineage.record import read_lineage
from srpo.reporting.table import set_measures, show, verdict
from srpo.rounds import BASE, Round
from srpo.sampling.sizes import allowed_sizes, names_of

LOWER_IS_BETTER = ("fid", "kid", "cmmd")


@dataclass(frozen=True)
class License:
    """A license: its id on the Hub, its name, where its text is, and the uses it forbids, as a Markdown list."""

    id: str
    name: str
    link: str | None = None
    restrictions: str = ""


# Attachment A of the license of Stable Diffusion XL base 1.0; every derivative must include it
OPENRAIL = License(
    id="openrail++",
    name="CreativeML Open RAIL++-M License of July 26, 2023",
    link="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    restrictions=(Path(__file__).parent / "licenses" / "openrail++.md").read_text(encoding="utf-8"),
)
UNKNOWN = License(id="other", name="the base model's license")
LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": OPENRAIL}


def license_of(base: str) -> License:
    """Return the license of a derivative of this base model; `UNKNOWN` for a model that is not in `LICENSES`."""
    return LICENSES.get(base, UNKNOWN)


def render_card(round: Round, files: dict[str, str], images: Sequence[tuple[str, str]]) -> str:
    """Return the model card of a round's export: YAML front matter for the Hub, then Markdown.

    Args:
        files: the export's weights by kind: any of `diffusers`, `kohya`, `merged` and `single_file`, each a path in the
            export.
        images: (path in the export, prompt) of the example images.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    lineage = read_lineage(round.files)
    source = lineage["base"]["source"]
    license_ = license_of(source)
    on_hub = lineage["base"]["digest"] is None and bool(HUB_ID.fullmatch(source))
    data = ModelCardData(
        license=license_.id,
        license_name="base-models-license" if license_ is UNKNOWN else None,
        base_model=source if on_hub else None,
        base_model_relation=("adapter" if "diffusers" in files else "finetune") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion-xl", "text-to-image", "srpo", *(["lora"] if "diffusers" in files else [])],
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in images],
    )
    generate = round.params.generate
    environment = Environment(
        loader=PackageLoader("srpo.release"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "show": show}
    body = environment.get_template("model_card.md").render(
        name=f"{round.params.tracking.campaign}-{round.key}",
        round=round.key,
        path=[BASE, *round.ancestors, round.key],
        base={"loras": [], "fp8": False} | lineage["base"],
        on_hub=on_hub,
        license=license_,
        files=files,
        images=images,
        params=round.params,
        sizes=names_of(allowed_sizes(generate)),
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
    """Return text as one cell of a Markdown table, with its Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", " ".join(str(text).split()))


def _measures(round: Round) -> list[dict[str, str]]:
    """Return rows of the evaluation table: name, role, better, base, round; values with their 95 % intervals."""
    sweep = read_sweep(round.files)
    base_sweep = read_sweep(round.base_files)
    guidance = str(read_metrics(round.files)["guidance"])
    rows = []
    for name in (*round.params.rewards, *set_measures(round.params), *IMAGE_STATS):
        if name not in sweep[guidance]:
            continue
        role = (
            {"select": "selected the winners", "judge": "judge"}[round.params.rewards[name].role]
            if name in round.params.rewards
            else ""
        )
        better = "lower" if name in LOWER_IS_BETTER else "higher" if name in round.params.rewards else ""
        values = {"base": _interval(base_sweep[guidance], name), "round": _interval(sweep[guidance], name)}
        rows.append({"name": name, "role": role, "better": better} | values)
    gate = read_gate(round.files)
    for name, rates in gate["win_rate"].items():
        best = rates["best"]
        row = {"name": f"{name}: win rate over base, each at its best guidance", "role": "", "better": "higher"}
        rows.append(row | {"base": "0.5", "round": _spread(best["value"], best["low"], best["high"])})
    if human := gate["human"]:
        row = {"name": f"people: win rate over base, {human['votes']} blind votes", "role": "", "better": "higher"}
        rows.append(row | {"base": "0.5", "round": _spread(*human["win_rate"].values())})
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
    """Return the sha256 hashes of lineage.json and DVC's hashes of the round's outputs, by name."""
    known = {name: lineage[name] for name in ("adapter", "parent_adapter", "winners", "code") if lineage[name]}
    hashes = {f"{name.replace('_', ' ')} (sha256)": value for name, value in known.items()}
    return hashes | {f"{name} (DVC)": value for name, value in round_hashes(root, key).items()}
