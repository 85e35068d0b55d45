"""Stage `report`: one self-contained page about a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from srpo.config.loader import Params
from srpo.data import parquet
from srpo.data.eval_scores import at_guidance, read_eval_scores
from srpo.data.prompts import load_prompts
from srpo.data.records import read_gate, read_metrics, read_sweep
from srpo.data.scores import read_scores
from srpo.lineage.record import read_lineage
from srpo.reporting import charts, contact_sheets
from srpo.reporting.html import chart, embedded_image, numbers, render_page
from srpo.reporting.table import set_measures
from srpo.reporting.tags import TagRow, scores_by_tag
from srpo.rounds import BASE, Round, RoundFiles
from srpo.selection.audit import PREFIX
from srpo.storage.files import publish
from srpo.storage.json_files import read_json, reading
from srpo.storage.scratch import scratch_folder


def report(round: Round) -> None:
    """Write `rounds/<key>/report/`: index.html, winners.png and tuned.png.

    The page embeds its images and loads nothing. The same files give the same bytes. Of other rounds, only the
    evaluations of base and of the parent are read; of the prompt files, only the tags of the eval prompts.

    Raises:
        UserError: a dataset of the round is missing or damaged.
    """
    files, parent = round.files, round.parent
    learned = contact_sheets.winners_and_losers(round.params, files)
    tuned = contact_sheets.before_and_after(round.root, round.key)
    sweeps = {name: read_sweep(RoundFiles(round.root, name)) for name in dict.fromkeys((BASE, parent, round.key))}
    measured = {
        name: numbers(name, read_metrics(RoundFiles(round.root, name)), sweep) for name, sweep in sweeps.items()
    }
    training = _training(files.training)
    page = render_page(
        "report.html",
        key=round.key,
        parent=parent,
        selects=round.params.reward_names("select"),
        judges=round.params.reward_names("judge"),
        metrics=measured[round.key],
        gate=read_gate(round.files),
        rows=list(measured.values()),
        names=[*round.params.rewards, *set_measures(round.params)],
        steps=training.height,
        tuned=[_figure(pair) for pair in tuned],
        learned=[_figure(pair) for pair in learned],
        charts=_charts(round.params, files, measured, sweeps, training),
        lineage=_lineage_rows(files),
        selection=_selection(files),
        rejection=_early_rejection(round.params, files),
        tags=_tags(round, float(measured[round.key]["guidance"])),
    )  # fmt: skip
    scratch = scratch_folder(round.root, "report", round.key)
    (scratch / "index.html").write_text(page, encoding="utf-8")
    contact_sheets.save_contact_sheet(
        learned, f"Round {round.key}: training data", "winner", "worst candidate of its prompt", scratch / "winners.png"
    )
    contact_sheets.save_contact_sheet(
        tuned,
        f"Round {round.key}: held-out prompts, same noise",
        "base model",
        f"after round {round.key}",
        scratch / "tuned.png",
    )
    publish(scratch, files.report)


def _training(path: Path) -> pl.DataFrame:
    with reading(path):
        try:
            return pl.read_csv(path).cast({"step": pl.Int64, "loss": pl.Float64})
        except pl.exceptions.PolarsError as error:
            raise ValueError(error) from None


def _figure(pair: contact_sheets.Pair) -> dict[str, Any]:
    """Return a pair for the page: separate images and real text, for small screens and screen readers."""
    sides = ((pair.left, pair.left_lines), (pair.right, pair.right_lines))
    return {"prompt": pair.prompt, "sides": [embedded_image(image) | {"lines": lines} for image, lines in sides]}


def _charts(
    params: Params, files: RoundFiles, measured: dict[str, dict], sweeps: dict[str, dict], training: pl.DataFrame
) -> dict[str, list]:
    """Return by section [(name, SVG data URI)], one chart each, so that a narrow screen can stack them."""
    rewards = {name: spec.role for name, spec in params.rewards.items()}
    scores = read_scores(files.scores, rewards)
    winners = parquet.table(files.winners, ["candidate_id"]).join(scores, on="candidate_id", how="left")
    sweeps = {name if name == BASE else f"round {name}": sweep for name, sweep in sweeps.items()}
    path = [list(measured)]
    roles = rewards | dict.fromkeys(set_measures(params), "measure")
    drawn = {
        "rounds": {name: charts.over_rounds(measured, path, name, role) for name, role in roles.items()},
        "sweep": {name: charts.sweep(sweeps, name) for name in [*rewards, "fid", "cmmd", "saturation"]},
        "histograms": {
            name: charts.histograms(name, scores[name].drop_nulls().to_numpy(), winners[name].to_numpy())
            for name in rewards
        },
        "training": {"training loss": charts.training(training["step"].to_list(), training["loss"].to_list())},
    }
    return {section: [(name, chart(svg)) for name, svg in svgs.items()] for section, svgs in drawn.items()}


def _lineage_rows(files: RoundFiles) -> list[tuple[str, str]]:
    lineage = read_lineage(files)
    base = lineage["base"]
    return [
        ("adapter of this round", lineage["adapter"]),
        ("winners used for training", lineage["winners"]),
        (f"adapter of the parent ({lineage['parent']})", lineage["parent_adapter"] or "none: the parent is base"),
        ("base model", f"{base['source']}  {base['digest'] or base['revision'] or 'not pinned'}"),
        *(
            (f"LoRA in the base model, at {lora['scale']:g}", f"{lora['source']}  {lora['digest']}")
            for lora in base.get("loras", ())
        ),
        ("code", lineage["code"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())),
    ]


def _selection(files: RoundFiles) -> dict[str, Any]:
    """Return the numbers of candidates, prompts and winners, counted in the datasets."""
    scores = read_scores(files.scores, {})
    winners = parquet.table(files.winners, ["candidate_id"])
    return {"candidates": scores.height, "prompts": scores["prompt_id"].n_unique(), "winners": winners.height}


def _tags(round: Round, guidance: float) -> dict[str, list[TagRow]]:
    """Return the scores by tag of base and of the round, at the reported guidance."""
    rewards = list(round.params.rewards)
    prompts = load_prompts(round.root / round.params.prompts.eval)
    base, scores = (
        at_guidance(read_eval_scores(files, rewards), guidance) for files in (round.base_files, round.files)
    )
    return scores_by_tag(prompts, base, scores, rewards)


def _early_rejection(params: Params, files: RoundFiles) -> list[tuple[str, float | None]]:
    """Return early rejection's numbers in selection.json as (label, value); empty when it is off."""
    rules = params.generate.early_rejection
    if rules is None:
        return []
    path = files.winners / "selection.json"
    summary = read_json(path) if path.exists() else {}
    labels = {
        "unet_evaluations_share": "UNet evaluations, as a share of those without early rejection",
        "unet_evaluations_share_unaudited": "the same, audited prompts left out",
        "audited_prompts": "audited prompts (all candidates were finished)",
        "regret": f"regret: best {rules.reward} minus the best after early rejection",
        "regret_share": "regret as a share of the best-of-N gain",
        "same_best": "share of audited prompts that keep their best candidate",
    } | {
        f"rank_correlation_{point.step}": f"rank correlation of preview and final {rules.reward}, step {point.step}"
        for point in rules.checkpoints
    }
    return [(label, summary[PREFIX + name]) for name, label in labels.items() if PREFIX + name in summary]
