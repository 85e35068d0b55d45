"""`srpo check`: everything that can be known before hours are spent. No weights, no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "warn", "fail"]


class CheckResult(NamedTuple):
    """One line of `srpo check`.

    Attributes:
        name: the checked key of params.yaml, file or service.
        state: `fail` is an error, `warn` a risk.
        text: the cause, and the remedy where one is needed.
    """

    name: str
    state: State
    text: str
