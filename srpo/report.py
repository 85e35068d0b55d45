"""Stage `report`: one self-contained page that shows what a round did. No torch in here."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from srpo import charts, datasets
from srpo.lineage import read_lineage, read_metrics
from srpo.params import Params
from srpo.pictures import Pair, contact_sheet
from srpo.rounds import BASE, RoundFiles
from srpo.scratch import scratch_folder
from srpo.summary import SET_MEASURES, show

PAIRS = 12


def report(params: Params, root: Path, key: str) -> None:
    """Write `rounds/<key>/report/`: index.html, winners.png and tuned.png.

    The page embeds its pictures and loads nothing. The same files give the same bytes.

    Raises:
        UserError: a dataset of the round is missing or damaged.
    """
    files, parent = RoundFiles(root, key), params.rounds[key].parent
    scratch = scratch_folder(root, "report", key, "redone from the start")
    _winners_sheet(params, files).save(scratch / "winners.png", optimize=True)
    _tuned_sheet(root, key).save(scratch / "tuned.png", optimize=True)
    path = list(dict.fromkeys((BASE, parent, key)))
    metrics = {name: read_metrics(root, name) for name in path}
    names = [*params.rewards, *SET_MEASURES]
    environment = Environment(loader=PackageLoader("srpo"), autoescape=select_autoescape(default=True))
    environment.filters["show"] = show
    page = environment.get_template("report.html").render(
        key=key,
        parent=parent,
        params=params,
        metrics=metrics[key],
        rows=[{"round": name} | metrics[name] for name in path],
        names=names,
        winners_sheet=_data_uri((scratch / "winners.png").read_bytes(), "image/png"),
        tuned_sheet=_data_uri((scratch / "tuned.png").read_bytes(), "image/png"),
        charts={
            name: _data_uri(svg.encode(), "image/svg+xml") for name, svg in _charts(params, files, metrics).items()
        },
        lineage=_lineage_rows(root, key),
        selection=_selection(files),
    )
    (scratch / "index.html").write_text(page, encoding="utf-8")
    datasets.publish(scratch, files.report)


def _charts(params: Params, files: RoundFiles, metrics: dict[str, dict]) -> dict[str, str]:
    labels = {name: f"round {name}" if name != BASE else BASE for name in metrics}
    scores, winners = pl.read_parquet(files.scores), _winner_scores(params, files)
    curve = pl.read_csv(files.training)
    return {
        "sweep": charts.sweep(
            {labels[name]: found["sweep"] for name, found in metrics.items()}, [*params.rewards, "fid"]
        ),
        "histograms": charts.histograms(
            {name: scores[name].to_numpy() for name in params.rewards},
            {name: winners[name].to_numpy() for name in params.rewards},
        ),
        "training": charts.training(curve["step"].to_list(), curve["loss"].to_list()),
    }


def _winner_scores(params: Params, files: RoundFiles) -> pl.DataFrame:
    return pl.read_parquet(datasets.shards(files.winners), columns=list(params.rewards))


def _winners_sheet(params: Params, files: RoundFiles) -> Image.Image:
    """Winner beside loser for prompts spread over all margins, largest first."""
    columns = ["candidate_id", "prompt", "margin", "loser_id", "image", params.reward_names("select")[0]]
    margins = sorted(
        datasets.read_rows(files.winners, ["candidate_id", "margin"]),
        key=lambda row: (-row["margin"], row["candidate_id"]),
    )
    wanted = {row["candidate_id"]: place for place, row in enumerate(_spread(margins, PAIRS))}
    chosen = [row for row in datasets.read_rows(files.winners, columns) if row["candidate_id"] in wanted]
    chosen.sort(key=lambda row: wanted[row["candidate_id"]])
    losers = {row["loser_id"] for row in chosen}
    pictures = {
        row["candidate_id"]: datasets.decode_image(row["image"])
        for row in datasets.read_rows(files.candidates, ["candidate_id", "image"])
        if row["candidate_id"] in losers
    }
    reward = columns[-1]
    known = pl.read_parquet(files.scores, columns=["candidate_id", reward]).filter(pl.col("candidate_id").is_in(losers))
    scores = dict(known.iter_rows())
    pairs = [
        Pair(
            datasets.decode_image(row["image"]),
            pictures[row["loser_id"]],
            row["prompt"],
            f"{reward} {row[reward]:.2f}",
            f"{reward} {scores[row['loser_id']]:.2f}",
        )
        for row in chosen
    ]
    return contact_sheet(
        pairs, f"Round {files.key}: what was kept", "the winner", "the worst candidate of the same prompt"
    )


def _tuned_sheet(root: Path, key: str) -> Image.Image:
    """Base beside this round, same prompt and same noise."""

    def samples(name: str) -> dict[tuple[str, int], dict[str, Any]]:
        rows = datasets.read_rows(RoundFiles(root, name).evaluation / "samples.parquet")
        return {(row["prompt_id"], row["index"]): row for row in rows}

    before, after = samples(BASE), samples(key)
    first = [place for place in after if place in before and place[1] == 0]
    pairs = [
        Pair(
            datasets.decode_image(before[place]["image"]),
            datasets.decode_image(after[place]["image"]),
            after[place]["prompt"],
            BASE,
            f"round {key}",
        )
        for place in _spread(first, PAIRS)
    ]
    return contact_sheet(pairs, f"Round {key}: held-out prompts, same noise", "the base model", f"after round {key}")


def _spread(items: list, count: int) -> list:
    """`count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _lineage_rows(root: Path, key: str) -> list[tuple[str, str]]:
    lineage = read_lineage(root, key)
    base = lineage["base"]
    return [
        ("adapter", lineage["adapter"]),
        ("winners it was trained on", lineage["winners"]),
        (f"parent adapter ({lineage['parent']})", lineage["parent_adapter"] or "none: starts from base"),
        ("base model", f"{base['source']}  {base['digest'] or base['revision'] or 'not pinned'}"),
        ("code", lineage["code"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())),
    ]


def _selection(files: RoundFiles) -> dict[str, Any]:
    import json

    return json.loads((files.winners / "selection.json").read_text(encoding="utf-8"))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
