"""Filters and order of the browse page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

PAGE = 60
ORDERS = ("order", "highest", "lowest", "disagreement")


@dataclass(frozen=True)
class Filters:
    """The filters as the page's form sends them; those without a meaning are left at their defaults."""

    text: str = ""
    tag: str = ""
    show: str = "all"
    reward: str = ""
    least: str = ""
    sort: str = "order"
    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str], rewards: list[str]) -> Filters:
        """Return the filters of a query string."""
        number = query.get("page", "1")
        default = rewards[0] if rewards else ""
        return cls(
            text=query.get("text", "").strip()[:200],
            tag=query.get("tag", ""),
            show=query["show"] if query.get("show") in ("winners", "invalid") else "all",
            reward=query["reward"] if query.get("reward") in rewards else default,
            least=query.get("least", "").strip()[:20],
            sort=query["sort"] if query.get("sort") in ORDERS else "order",
            page=int(number) if number.isascii() and number.isdigit() and len(number) < 9 else 1,
        )


def browse(candidates: pl.DataFrame, filters: Filters) -> dict[str, Any]:
    """Return what the page shows: `rows`, `found` (how many in all), `pages`, `filters` and the `tags` there are."""
    found = candidates.filter("finished")
    if filters.text:
        wanted = pl.col("prompt").str.to_lowercase().str.contains(filters.text.lower(), literal=True)
        found = found.filter(wanted | (pl.col("prompt_id") == filters.text))
    if filters.tag:
        found = found.filter(pl.col("tags").list.contains(filters.tag))
    if filters.show != "all":
        found = found.filter("winner" if filters.show == "winners" else "invalid")
    try:
        least = float(filters.least)
    except ValueError:
        least = None
    if filters.reward and least is not None:
        found = found.filter(pl.col(filters.reward) >= least)
    if filters.sort == "disagreement":
        found = found.sort("disagreement", descending=True, nulls_last=True, maintain_order=True)
    elif filters.sort != "order" and filters.reward:
        score = pl.col(filters.reward).fill_nan(None)
        found = found.sort(score, descending=filters.sort == "highest", nulls_last=True, maintain_order=True)
    pages = max(1, -(-found.height // PAGE))
    page = min(max(1, filters.page), pages)
    tags = sorted({tag for row in candidates["tags"].unique().to_list() for tag in row})
    return {
        "rows": found.slice((page - 1) * PAGE, PAGE).to_dicts(),
        "found": found.height,
        "page": page,
        "pages": pages,
        "filters": filters,
        "query": {name: value for name, value in asdict(filters).items() if name != "page"},
        "tags": tags,
        "orders": ORDERS,
    }
