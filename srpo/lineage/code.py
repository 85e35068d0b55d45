"""Identity of the code: of the whole package for lineage, of some modules for checkpoints and caches."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from srpo.storage.hashing import file_digest, value_digest

PACKAGE = Path(__file__).parents[1]


def code_digest() -> str:
    """Return the sha256 of this package's Python sources, whether they are committed or not."""
    files = sorted(PACKAGE.rglob("*.py"))
    return value_digest([(file.relative_to(PACKAGE).as_posix(), file_digest(file)) for file in files])


def import_closure_digest(*modules: str) -> str:
    """Return the sha256 of the code of these modules and of all modules of this package that they import.

    Comments, docstrings and layout do not count: results do not depend on them.

    Args:
        modules: full names, such as `srpo.training.loop`. Modules of other packages are skipped.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if module in found or file is None:
            continue
        tree = _parse(file)
        found[module] = ast.dump(tree)
        waiting += _imports(tree)
    return value_digest(found)


def _file(module: str) -> Path | None:
    """Return the source of a module of this package; None for any other name."""
    first, *rest = module.split(".")
    if first != PACKAGE.name:
        return None
    path = PACKAGE.joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@functools.cache
def _parse(file: Path) -> ast.Module:
    """Return the syntax tree without docstrings."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the names that may be modules, at any level of the source; the package has absolute imports only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
