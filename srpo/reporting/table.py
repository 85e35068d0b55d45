"""The campaign as a table: one row per evaluated round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.config import tree
from srpo.config.loader import PARAMS_FILE, Params, load_params
from srpo.data.records import read_metrics, read_sweep
from srpo.errors import without_secrets
from srpo.evaluation.gate import best_of_sweep
from srpo.rounds import RoundFiles

if TYPE_CHECKING:
    from rich.table import Table

CAMPAIGN_PAGE = "rounds/index.html"


def set_measures(params: Params) -> tuple[str, ...]:
    """Return the metrics of image sets that tables and pages show."""
    return ("fid", "kid", "cmmd", params.evaluate.diversity_name, "drift")


def campaign_rows(root: Path, params: Params) -> list[dict[str, Any]]:
    """Return one row per evaluated round: base first, parents before children.

    Keys: round, every reward's name, `set_measures` (numbers at the reported guidance) and verdict, with the gate's
    finding.
    """
    rows = []
    for key, metrics in _evaluated(root, params):
        numbers = {name: metrics.get(name) for name in (*params.rewards, *set_measures(params))}
        rows.append({"round": key} | numbers | {"verdict": verdict(metrics)})
    return rows


def best_rows(root: Path, params: Params) -> list[dict[str, Any]]:
    """Return one row per evaluated round with each model at its own best guidance, as the gate compares them.

    Keys: round, every reward's name, fid, and per judge `<judge> > base` and `<judge> > parent`: win rates, None for
    base. Means and FID are None where `guidance.csv` is not checked out.
    """
    rows = []
    for key, metrics in _evaluated(root, params):
        files = RoundFiles(root, key)
        sweep = read_sweep(files) if (files.evaluation / "guidance.csv").exists() else None
        best = best_of_sweep(sweep, params.rewards) if sweep else {}
        row = {"round": key} | {name: best.get(f"{name}_best") for name in (*params.rewards, "fid")}
        for judge in params.reward_names("judge"):
            row |= {f"{judge} > base": metrics.get(f"{judge}_win_rate")}
            row |= {f"{judge} > parent": metrics.get(f"{judge}_win_rate_parent")}
        rows.append(row)
    return rows


def _evaluated(root: Path, params: Params) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and `metrics.json` of each evaluated round, in the order of rows."""
    for key in (tree.BASE, *tree.order(params.rounds)):
        if (RoundFiles(root, key).evaluation / "metrics.json").exists():
            yield key, read_metrics(RoundFiles(root, key))


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return the verdict of a `metrics.json`, with the gate's finding if there is one."""
    finding = metrics.get("finding", "-")
    return metrics["verdict"] if finding == "-" else f"{metrics['verdict']}: {finding}"


def campaign_table(root: Path | str) -> list[dict[str, Any]]:
    """Return `campaign_rows` of the project folder `root`, by its params.yaml."""
    return campaign_rows(Path(root), load_params(Path(root) / PARAMS_FILE))


def addresses(params: Params, key: str) -> dict[str, str]:
    """Return a round's report, the campaign page, and the address or command that opens MLflow.

    User and password are left out of the address: this is printed.
    """
    uri = without_secrets(params.tracking.uri)
    return {
        "report": f"rounds/{key}/report/index.html",
        "campaign": CAMPAIGN_PAGE,
        "MLflow": uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}",
    }


def render(rows: list[dict[str, Any]], title: str = "SRPO campaign, on held-out prompts") -> Table:
    """Return the rows as a table for the terminal, without the gate's findings; `-` where a value is missing."""
    from rich import box
    from rich.table import Table

    # fits 80 columns: with long names the verdict wraps, numbers never do
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in rows[0] if rows else ("round",):
        words = name in ("round", "verdict")
        header = name.replace(" > ", "\n> ").replace("open_", "open_\n")
        table.add_column(header, justify="left" if words else "right", no_wrap=name != "verdict")
    for row in rows:
        cells = row | ({"verdict": row["verdict"].partition(":")[0]} if "verdict" in row else {})
        table.add_row(*(show(cells.get(name)) for name in rows[0]))
    return table


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the gate found, one line per round with a finding."""
    return [f"{row['round']}: {row['verdict'].partition(': ')[2]}" for row in rows if ": " in row["verdict"]]


def show(value: Any) -> str:
    """Return a cell's text: three decimals, fewer for large numbers."""
    if isinstance(value, float):
        return f"{value:.{1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3}f}"
    return "-" if value is None else str(value)
