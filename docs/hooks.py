"""Build-time pages of the site: params from the schema, commands from typer, one API page per package.

mkdocs calls the functions `on_*` (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
REPO = DOCS.parent
PARAMS_PAGE = "reference/params.md"
CLI_PAGE = "reference/cli.md"
API_FOLDER = "reference/api"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
LEAST = {"minLength": "not empty", "minItems": "at least one item", "minProperties": "at least one entry"}


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"API": [{name: f"{API_FOLDER}/{name}.md"} for name in packages()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {PARAMS_PAGE: params_page(), CLI_PAGE: cli_page()}
    pages |= {f"{API_FOLDER}/{name}.md": api_page(name) for name in packages()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the list of decisions to their index page."""
    return markdown + decisions_table() if page.file.src_uri == "decisions/index.md" else markdown


def params_page() -> str:
    """Return the reference of params.yaml: every key with its type, range, default and description."""
    from srpo.config.loader import Params

    schema = Params.model_json_schema()
    intro = (
        "# params.yaml\n\nGenerated from `srpo/config/schema.py`.\n"
        "Unknown keys, wrong types and values out of range are reported in one line, with exit status 2.\n"
        "A round may override any key of `generate`, `select` and `train`.\n"
        "`runtime` and `tracking` change no result, so no DVC stage depends on them.\n"
    )
    return intro + "".join(_section("", schema, schema["$defs"], "Top level"))


def _section(prefix: str, schema: dict[str, Any], models: dict[str, Any], title: str) -> list[str]:
    """Return the Markdown of one section, followed by that of the sections inside it."""
    rows, inner = [], []
    for name, field in schema["properties"].items():
        key, nested = prefix + name, _model_of(field)
        if nested:
            suffix = {"array": "[]", "object": ".<name>"}.get(_plain(field).get("type", ""), "")
            inner += _section(f"{key}{suffix}.", models[nested], models, f"`{key}{suffix}`")
        default = "*required*" if name in schema.get("required", ()) else f"`{_yaml(field.get('default'))}`"
        default = "its own defaults" if nested and isinstance(field.get("default"), dict) else default
        text = field.get("description") or models.get(nested or "", {}).get("description", "")
        cells = [f"`{key}`", _type(field), _range(field), default, " ".join(text.split())]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    about = " ".join(schema["description"].split())
    table = "| key | type | range | default | description |\n|---|---|---|---|---|\n" + "".join(rows)
    return [f"\n## {title}\n\n{about}\n\n{table}", *inner]


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an optional value without its null."""
    return next((option for option in field.get("anyOf", ()) if option.get("type") != "null"), field)


def _model_of(field: dict[str, Any]) -> str | None:
    """Return the name of the section that a value, list or mapping holds."""
    plain = _plain(field)
    for holder in (plain, plain.get("items"), plain.get("additionalProperties")):
        if isinstance(holder, dict) and "$ref" in holder:
            return str(holder["$ref"]).rsplit("/", 1)[-1]
    return None


def _type(field: dict[str, Any]) -> str:
    plain = _plain(field)
    if "enum" in plain:
        name = ", ".join(f"`{_yaml(value)}`" for value in plain["enum"])
    elif plain.get("type") == "array":
        name = f"list of {_type(plain['items'])}s"
    else:
        name = {"object": "mapping"}.get(plain.get("type", "object"), plain.get("type", "mapping"))
    return f"{name} or null" if plain is not field else name


def _range(field: dict[str, Any]) -> str:
    plain = _plain(field)
    values = plain.get("items", plain)
    parts = [f"{sign} {_number(values[name])}" for name, sign in LIMITS.items() if name in values]
    parts += [f"a multiple of {values['multipleOf']}"] if "multipleOf" in values else []
    parts += [text for name, text in LEAST.items() if name in plain]
    return ", ".join(parts)


def _number(value: float) -> str:
    return "2^31" if value == 2**31 else f"{value:g}"


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def cli_page() -> str:
    """Return the reference of the command line, as typer writes it."""
    command = [sys.executable, "-m", "typer", "srpo.cli", "utils", "docs", "--name", "srpo", "--title", "Commands"]
    page = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    page = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", page)  # texts cut short, which follow in full
    flows = "`python -m flows.rounds` and `python -m flows.promote` run rounds and promotion through Prefect"
    return f"{page}\n## Flows\n\n{flows}; `--help` lists their options.\n"


def packages() -> list[str]:
    """Return srpo and the packages inside it: the modules beside the packages first, then the stages."""
    inside = (f"srpo.{path.parent.name}" for path in (REPO / "srpo").glob("*/__init__.py"))
    return ["srpo", *sorted(inside, key=lambda name: (name != "srpo.stages", name))]


def api_page(package: str) -> str:
    """Return a page on which mkdocstrings documents every module of a package."""
    folder = REPO.joinpath(*package.split("."))
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    names = [package, *(f"{package}.{module}" for module in modules if module != "cli")]
    return f"# {package}\n\n" + "".join(f"::: {name}\n\n" for name in names)


def decisions_table() -> str:
    """Return a table of all decisions: number, title, date, status.

    Raises:
        ValueError: a decision has no title, date or status.
    """
    rows = []
    for file in sorted(DOCS.glob("decisions/[0-9]*.md")):
        found = re.match(r"# (\d+)\. (.+)\n\n\*(\d{4}-\d\d-\d\d) · (.+)\*\n", file.read_text(encoding="utf-8"))
        if not found:
            raise ValueError(f"{file}: must begin with a title `# <number>. <title>` and a line `*<date> · <status>*`")
        number, title, date, status = found.groups()
        rows.append(f"| {number} | [{title}]({file.name}) | {date} | {status} |\n")
    return "\n| | decision | date | status |\n|--:|---|---|---|\n" + "".join(rows)
