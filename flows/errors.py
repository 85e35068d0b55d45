"""Errors that are shown in one line, without a traceback in Prefect's logs.

A flow returns such an error in its final state. A worker's Prefect raises it from there all the same, and logs it.
"""

from __future__ import annotations

import logging

from srpo.errors import UserError

ENGINE_MESSAGE = "exited with unexpected exception"  # follows the message of the run's final state


class StageDied(RuntimeError):
    """A stage failed and may be retried. Its last lines are in the run's log."""


class BadInput(RuntimeError):
    """A stage, or DVC before it, found its input invalid. A retry would fail, too."""


class _OneLine(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or not isinstance(record.exc_info[1], (UserError, StageDied, BadInput)):
            return True
        record.exc_info = record.exc_text = None
        return ENGINE_MESSAGE not in record.getMessage()


_one_line_filter = _OneLine()


def show_in_one_line() -> None:
    """Remove the tracebacks of these errors from the logs of this process's Prefect."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_one_line_filter)
