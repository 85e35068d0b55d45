"""A cluster for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cluster import REPO, Nodes


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes, with one CPU each."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("home"))
        patch.setenv("XDG_CACHE_HOME", home)
        patch.setenv("HF_HOME", home)
        patch.setenv("PYTHONPATH", str(REPO))
        found = Nodes()
        found.add()
        yield found
        found.cluster.shutdown()
