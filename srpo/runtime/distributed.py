"""One command in several processes, one per GPU, started by torchrun's agent. Imports torch only to start them.

Workers are recognized by the environment variables of torchrun and `accelerate launch`, so a command may also be
started with either of them.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from srpo.errors import BlockedError, UserError
from srpo.runtime.processes import signal_at_parents_end

log = logging.getLogger(__name__)
PARENT_VARIABLE = "SRPO_PARENT"
NODE_VARIABLE = "SRPO_NODE"  # in a process of a cluster: the address of its machine
# exit statuses; only workers use BLOCKED
BAD_INPUT = 2
BLOCKED = 3
INTERRUPTED = 130
SHUTDOWN_SECONDS = 10


class HasProcesses(Protocol):
    """Settings with a number of processes, such as `runtime` of params.yaml."""

    @property
    def processes(self) -> int:
        """Processes per command."""


def is_worker() -> bool:
    """Return whether this process is one of several that run the same command."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return int(os.environ["RANK"]) if is_worker() else 0


def local_rank() -> int:
    """Return the number of this process among those of this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_worker() else 0


def world_size() -> int:
    """Return the number of processes that run this command."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else 1


def draws_progress() -> bool:
    """Return whether this process draws a progress bar: the first one does; in a cluster, the driver."""
    return rank() == 0 and NODE_VARIABLE not in os.environ


def is_parent(runtime: HasProcesses) -> bool:
    """Return whether this process has to start workers."""
    return runtime.processes > 1 and not is_worker()


def run(command: Callable[[], Sequence[str]], processes: int, attempts: int = 1) -> None:
    """Run `srpo <command>` in that many processes at once, until all succeed.

    When one fails, the others are stopped and all are started again, unless the input is bad or the command was
    interrupted. No worker outlives this process.

    Args:
        command: called before each attempt; returns the arguments.
        attempts: the most starts in total.

    Raises:
        UserError: bad input, as reported by a worker.
        BlockedError: an environment error, as reported by a worker.
        KeyboardInterrupt: interrupted.
        SystemExit: ended by a signal, or the last attempt failed.
    """
    for attempt in range(1, attempts + 1):
        failure = _run_once(["-m", "srpo", *command()], processes)
        if failure is None:
            return
        code, message = failure
        if code == BAD_INPUT:
            raise UserError(message)
        if code == BLOCKED:
            raise BlockedError(message)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        action = "restarting all" if attempt < attempts else "giving up"
        log.warning(
            "one of %d processes ended with %s; %s (attempt %d of %d)", processes, cause, action, attempt, attempts
        )
    raise SystemExit(1)


def become_worker() -> None:
    """Have a worker end with the process that called `run`. To be called first of all; does nothing elsewhere."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or sys.platform != "linux":
        return
    signal_at_parents_end(signal.SIGKILL)()
    if os.getppid() != int(parent):  # it had ended already
        sys.exit(INTERRUPTED)


def report_to_parent(error: Exception | str) -> None:
    """Leave a worker's error message for the process that started it, which prints it once."""
    if PARENT_VARIABLE not in os.environ:
        print(f"srpo: error: {error}", file=sys.stderr)
        return
    record = {"message": {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record), encoding="utf-8")


def _run_once(arguments: list[str], processes: int) -> tuple[int, str] | None:
    """Return the exit code and message of the first process that failed, or None."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # failures are logged by `run`
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with tempfile.TemporaryDirectory(prefix="srpo-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="srpo",
            # processes of one machine rendezvous in a file: without a port or a host name
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/rendezvous",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            message = failure.error_file_data["message"] if isinstance(failure.error_file_data, dict) else ""
            return failure.exitcode, message["message"] if isinstance(message, dict) else str(failure.message)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        finally:
            os.environ.pop(PARENT_VARIABLE)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return None
