"""What the report and the campaign page share: templates, embedded pictures, numbers with intervals. No torch here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from srpo.reporting import contact_sheets
from srpo.reporting.table import show, verdict


def render_page(template: str, **values: Any) -> str:
    """The page of a template in srpo/reporting/templates. Prompts are other people's text: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("srpo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    return environment.get_template(template).render(**values)


def numbers(name: str, metrics: Mapping[str, Any], sweep: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A round's headline numbers: metrics.json with, from its sweep, `<measure>_low` and `_high` where there are any.

    `round` is `name`; `verdict` also says what the gate found.
    """
    reported = sweep.get(str(metrics.get("guidance")), {})
    intervals = {key: value for key, value in reported.items() if key.endswith(("_low", "_high"))}
    return {**metrics, **intervals, "round": name, "verdict": verdict(metrics)}


def picture(image: Image.Image) -> dict[str, Any]:
    """A picture to embed: `uri`, and `tiny` when the browser should enlarge it pixel by pixel."""
    buffer = io.BytesIO()
    tiny = max(image.size) <= contact_sheets.TINY
    if tiny:
        image.save(buffer, format="PNG", optimize=True)
    else:
        contact_sheets.thumbnail(image).save(buffer, format="JPEG", quality=90)
    return {"uri": _data_uri(buffer.getvalue(), "image/png" if tiny else "image/jpeg"), "tiny": tiny}


def chart(svg: str) -> str:
    """A chart's data URI."""
    return _data_uri(svg.encode(), "image/svg+xml")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
