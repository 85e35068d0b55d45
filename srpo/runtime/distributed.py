"""A command in several processes, one a GPU, started by torchrun's agent; light to import.

A worker knows itself by the environment that torchrun and `accelerate launch` set, so that a command may be started by
either of them by hand, too.
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
from typing import TYPE_CHECKING

from srpo.errors import BlockedError, UserError
from srpo.runtime.processes import signal_at_parents_end

if TYPE_CHECKING:
    from srpo.config.schema import RuntimeParams

log = logging.getLogger("srpo")
PARENT_VARIABLE = "SRPO_PARENT"
BAD_INPUT, BLOCKED, INTERRUPTED = 2, 3, 130  # BLOCKED is a worker's alone
END_SECONDS = 10


def is_worker() -> bool:
    """Whether this process is one of several that run the same command."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def rank() -> int:
    """This process's number among all, from 0."""
    return int(os.environ["RANK"]) if is_worker() else 0


def local_rank() -> int:
    """This process's number among those of this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_worker() else 0


def world_size() -> int:
    """How many processes run this command."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else 1


def is_parent(runtime: RuntimeParams) -> bool:
    """Whether this process is to start others that do the work."""
    return runtime.processes > 1 and not is_worker()


def run(command: Callable[[], Sequence[str]], processes: int, attempts: int = 1) -> None:
    """Run `srpo <command>` in that many processes at once, until all have ended well.

    When one dies the others are ended, and after that all are started again, at most `attempts` times in all. What
    finds its input bad or is interrupted is not tried again. No worker outlives this process.

    Args:
        command: asked for the arguments before each attempt.

    Raises:
        UserError: what a worker found wrong with the input.
        BlockedError: what stood in a worker's way.
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
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        again = "starting all again" if attempt < attempts else "giving up"
        log.warning(
            "one of %d processes ended with %s; %s (attempt %d of %d)", processes, how, again, attempt, attempts
        )
    raise SystemExit(1)


def become_worker() -> None:
    """In a worker, before anything else: end when the parent that `run` was called in does."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or sys.platform != "linux":
        return
    signal_at_parents_end(signal.SIGKILL)()
    if os.getppid() != int(parent):  # it ended before we asked
        sys.exit(INTERRUPTED)


def tell_parent(error: Exception | str) -> None:
    """In a worker: leave the message for the parent, who prints it once for all."""
    if PARENT_VARIABLE not in os.environ:
        print(f"srpo: error: {error}", file=sys.stderr)
        return
    record = {"message": {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record), encoding="utf-8")


def _run_once(arguments: list[str], processes: int) -> tuple[int, str] | None:
    """None when all ended well, else the exit code and the message of the first that did not."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is told here
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with tempfile.TemporaryDirectory(prefix="srpo-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="srpo",
            # processes of one machine meet in a file: no port is opened for that, no host name looked up
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/meeting",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=END_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            told = failure.error_file_data["message"] if isinstance(failure.error_file_data, dict) else ""
            return failure.exitcode, told["message"] if isinstance(told, dict) else str(failure.message)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        finally:
            os.environ.pop(PARENT_VARIABLE)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return None
