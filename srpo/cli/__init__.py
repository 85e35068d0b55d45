"""The command line. Each command imports the code it runs, so that `srpo --help` starts at once."""

from __future__ import annotations

import logging
import os
import sys

import typer

# each adds its commands, in the order in which the help shows them
from srpo.cli import stages, project, results, people  # noqa: F401  # isort: skip
from srpo.cli.common import app
from srpo.errors import UserError, environment_error_message
from srpo.runtime import distributed

__all__ = ["app", "run"]


def run(argv: list[str]) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 bad input, 130 interrupted."""
    # the first of several processes draws a progress bar; lines of the others overwrite it until it is drawn again
    overwrites_bar = distributed.rank() > 0 and sys.stderr.isatty()
    line_format = "\r\x1b[K%(message)s" if overwrites_bar else "%(message)s"
    logging.basicConfig(level=logging.INFO, format=line_format, stream=sys.stderr, force=True)
    for library in ("alembic", "bitsandbytes", "mlflow", "httpx", "httpx2", "transformers", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # read when it is imported; it raises what it logs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(args=argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        if distributed.is_worker():
            distributed.report_to_parent(error)
        else:
            print(f"srpo: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        if not distributed.is_worker():
            print("srpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors; some versions of typer contain a copy of click
            print(f"srpo: error: {error.format_message()}", file=sys.stderr)
            return 2
        if message := environment_error_message(error):
            if distributed.is_worker():
                distributed.report_to_parent(message)
                return distributed.BLOCKED
            print(f"srpo: error: {message}", file=sys.stderr)
            return 1
        raise
