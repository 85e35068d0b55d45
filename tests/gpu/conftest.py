"""Fixtures of the tests that need a GPU: the random-weight projects of the other tests."""

from __future__ import annotations

from tests.training.conftest import params, root, two_rounds

__all__ = ["params", "root", "two_rounds"]
