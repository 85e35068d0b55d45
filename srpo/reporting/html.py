"""Parts that the report and the campaign page share: templates, embedded images, numbers with intervals."""

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
    """Return the page of a template in srpo/reporting/templates. All values are escaped: prompts are untrusted text."""
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
    """Return a round's headline numbers: metrics.json, and from its sweep `<measure>_low` and `_high` if it has them.

    `round` is `name`; `verdict` includes the gate's finding.
    """
    reported = sweep.get(str(metrics.get("guidance")), {})
    intervals = {key: value for key, value in reported.items() if key.endswith(("_low", "_high"))}
    return {**metrics, **intervals, "round": name, "verdict": verdict(metrics)}


def embedded_image(image: Image.Image) -> dict[str, Any]:
    """Return an image to embed: `uri`, and `tiny` if the browser should enlarge it without smoothing."""
    buffer = io.BytesIO()
    tiny = max(image.size) <= contact_sheets.TINY
    if tiny:
        image.save(buffer, format="PNG", optimize=True)
    else:
        contact_sheets.thumbnail(image).save(buffer, format="JPEG", quality=90)
    return {"uri": _data_uri(buffer.getvalue(), "image/png" if tiny else "image/jpeg"), "tiny": tiny}


def chart(svg: str) -> str:
    """Return a chart's data URI."""
    return _data_uri(svg.encode(), "image/svg+xml")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
