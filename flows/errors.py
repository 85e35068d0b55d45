"""Failures that are one line to the user: Prefect's logs show them without a traceback.

A flow that ends with one returns it in its state. A worker's Prefect raises it from there all the same, and logs that.
"""

from __future__ import annotations

import logging

from srpo.errors import UserError

ENGINE_WORDS = "exited with unexpected exception"  # said after the run's last state, which names the failure


class StageDied(RuntimeError):
    """A stage died; its last words are in the run's log. It may be tried again."""


class BadInput(RuntimeError):
    """A stage, or DVC before it, refused its input. Trying again would give the same answer."""


class _OneLine(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or not isinstance(record.exc_info[1], (UserError, StageDied, BadInput)):
            return True
        record.exc_info = record.exc_text = None
        return ENGINE_WORDS not in record.getMessage()


_one_line = _OneLine()


def show_in_one_line() -> None:
    """Have this process's Prefect leave out the tracebacks of these failures."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_one_line)
