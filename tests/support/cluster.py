"""A Ray cluster of several nodes on loopback, and what its tests share."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from srpo.config.loader import Params
from tests.support.servers import free_port

REPO = Path(__file__).parents[2]
ADDRESS = "127.0.0.2"  # Ray replaces 127.0.0.1 by the host's own address
OPTIONS = {"include_dashboard": False, "object_store_memory": 100 * 2**20, "node_ip_address": ADDRESS}


class Nodes:
    """A cluster of a head with one CPU, and the nodes that are added.

    Attributes:
        address: the head's `<host>:<port>`.
        client_address: its `ray://<host>:<port>`; None without the packages that Ray needs for it.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        port = free_port() if find_spec("grpc") else None
        head = OPTIONS | {"num_cpus": 1, "ray_client_server_port": port}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.client_address = f"ray://{ADDRESS}:{port}" if port else None

    def add(self, cpus: int = 1) -> Any:
        return self.cluster.add_node(num_cpus=cpus, **OPTIONS)

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of this cluster whose actor's class has this name."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[0].startswith(f"ray::{name}"):
                    found.append(process)
            except (psutil.Error, IndexError):  # it ended
                continue
        return found


def with_cluster(params: Params, address: str | None, **options: object) -> Params:
    runtime = params.runtime.model_copy(update={"cluster": address, **options})
    return params.model_copy(update={"runtime": runtime})


def journal(path: Path) -> list[tuple[str, str]]:
    """Return the name of each unit that was begun, and the process that began it."""
    if not path.exists():
        return []
    return [(name, pid) for name, pid in (line.split() for line in path.read_text().splitlines())]


@contextmanager
def after(condition: Callable[[], object], action: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread once a condition holds, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if condition():
                action()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def kill(pid: str) -> None:
    os.kill(int(pid), signal.SIGKILL)
