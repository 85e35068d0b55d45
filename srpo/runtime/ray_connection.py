"""Connecting to a Ray cluster, and what it has."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from srpo.config.schema import RuntimeParams
from srpo.errors import UserError, one_line
from srpo.runtime.node_process import Node, version_problem, versions

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10
CHECK_SECONDS = 300  # a node starts a process for it
OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster on this machine, whose units do not pass through it


@contextmanager
def connected(runtime: RuntimeParams) -> Iterator[None]:
    """Connect to `runtime.cluster`, or start one on this machine and end it after the block.

    Raises:
        UserError: it can't be reached, or a node has other versions than this machine.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if is_one_machine(runtime):
        options |= {"address": "local", "_node_ip_address": LOOPBACK, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    else:
        _check_reachable(runtime.cluster or "")
        options |= {"address": runtime.cluster}
    ray._private.worker._worker_logs_enabled = False  # else Ray prints a page for each process that ends
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UserError(f"runtime.cluster: {runtime.cluster}: {one_line(error):.200}") from error
    ended_by: list[int] = []

    def end(number: int, _frame: object) -> None:
        ended_by.append(number)
        raise KeyboardInterrupt  # a SystemExit would lose its status on its way through Ray

    signal.signal(signal.SIGTERM, end)
    try:
        _check_versions()
        yield
    except KeyboardInterrupt:
        if ended_by:
            raise SystemExit(128 + ended_by[0]) from None
        raise
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def is_one_machine(runtime: RuntimeParams) -> bool:
    """Return whether the cluster is started for this command, on this machine."""
    return runtime.cluster == "local"


def uses_gpus(runtime: RuntimeParams) -> bool:
    """Return whether processes of the cluster compute on GPUs: `device: auto` does if it has any."""
    return runtime.device == "cuda" or (runtime.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def is_alive(node: Node) -> bool:
    """Return whether this node is still in the cluster."""
    return any(other["Alive"] and other["NodeID"] == node.id for other in ray.nodes())


def _check_reachable(cluster: str) -> None:
    """Try the port before Ray does, which would retry for minutes."""
    if cluster == "auto":
        return
    host, _, port = cluster.removeprefix("ray://").rpartition(":")
    if not cluster.startswith("ray://") and host in (LOOPBACK, "localhost"):
        host = get_node_ip_address()  # as Ray does
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"runtime.cluster: {cluster}: no answer from {host}:{port} ({one_line(error)}); is `ray start` running?"
        ) from None


def _check_versions() -> None:
    """Compare the versions of all nodes with this machine's, before there is work."""
    wanted = versions()
    task = ray.remote(num_cpus=0)(versions)
    nodes = [Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote() for node in nodes
    ]
    for node, call in zip(nodes, calls, strict=True):
        try:
            found = ray.get(call, timeout=CHECK_SECONDS)
        except RayError as error:
            if not is_alive(node):
                continue
            raise UserError(
                f"runtime.cluster: machine {node.address} can't run srpo ({one_line(error)[-200:]}); install it there"
            ) from None
        if problem := version_problem(wanted, found):
            raise UserError(f"runtime.cluster: machine {node.address} {problem}")
