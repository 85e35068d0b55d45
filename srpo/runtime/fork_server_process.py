"""The fork server's process: it imports modules, accepts commands and forks a child for each.

It imports and does nothing else: it touches no device and computes nothing, because neither a CUDA context nor a thread
survives a fork (a child of a process that has *used* Polars or OpenMP hangs). Variables that libraries read while they
are imported (HF_HUB_OFFLINE, OMP_NUM_THREADS) are the server's; all others are those of the command.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from srpo.runtime.fork_server import FORWARDED, STARTED, run_inline
from srpo.runtime.processes import end_with_parent

PRELOAD_VARIABLE = "SRPO_FORK_SERVER_PRELOAD"
# module, or module:attribute where a library loads lazily. `dvc` modules come first: its commands wait for no others.
PRELOAD = (
    "dvc.cli", "dvc.cli.parser", "dvc.repo", "dvc.commands.repro", "dvc.stage.run", "dvc.repo.reproduce",
    "dvc.dependency.param", "dvc.output", "dvc.cachemgr", "dvc.data_cloud",
    "polars", "pyarrow.parquet", "PIL.Image", "jinja2", "matplotlib.figure", "rich.table",
    "srpo.cli", "srpo.stages.base", "srpo.stages.select", "srpo.stages.report", "srpo.tracking.sync",
    "srpo.reporting.table",
    "mlflow.tracking:MlflowClient", "mlflow.store.tracking.sqlalchemy_store",
    "torch", "diffusers:StableDiffusionXLPipeline", "diffusers:UNet2DConditionModel", "diffusers:AutoencoderKL",
    "diffusers:EulerDiscreteScheduler", "diffusers:DDPMScheduler", "transformers:CLIPTextModel",
    "transformers:CLIPTextModelWithProjection", "transformers:CLIPTokenizer", "transformers:CLIPModel",
    "transformers:CLIPProcessor", "transformers:CLIPImageProcessor", "peft", "torchmetrics",
    "srpo.stages.generate", "srpo.stages.score", "srpo.stages.train", "srpo.stages.evaluate", "srpo.stages.gate",
    "srpo.rewards.clip", "srpo.rewards.templates",
)  # fmt: skip


@dataclass(eq=False)
class _Command:
    connection: socket.socket
    request: dict
    fds: list[int]
    pid: int = 0

    def signal_group(self, number: int) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def has_lost_client(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.connection.close()


class Server:
    """Imports modules, accepts commands, forks their processes and reports exit codes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.to_import = list(os.environ.get(PRELOAD_VARIABLE, " ".join(PRELOAD)).split())
        self.waiting: list[_Command] = []
        self.running: list[_Command] = []
        self.end_with_parent = end_with_parent(signal.SIGKILL)
        self.listener = socket.socket(socket.AF_UNIX)
        old_mask = os.umask(0o077)
        self.listener.bind(path)
        os.umask(old_mask)
        self.listener.listen(64)
        self.wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in FORWARDED:
            signal.signal(number, lambda *_: sys.exit())
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, sys.exit)  # the driver ended
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wake, selectors.EVENT_READ, self._reap)

    def run(self) -> None:
        """Serve until standard input closes or a signal arrives, then kill all commands."""
        # diffusers queries CUDA when it is imported; queried through NVML, CUDA stays usable in forked children
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        gc.disable()  # imports leave no garbage
        try:
            while True:
                for key, _ in self.selector.select(0 if self.to_import or self.waiting else None):
                    key.data()
                for command in [c for c in self.waiting if self._is_ready(c)]:
                    self.waiting.remove(command)
                    self._start(command)
                if self.to_import:
                    _import(self.to_import.pop(0))
        finally:
            for command in self.running:
                command.signal_group(signal.SIGKILL)
            with contextlib.suppress(OSError):  # the driver that made the folder may have been killed
                self.path.unlink()
                self.path.parent.rmdir()

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        try:
            header, fds, _, _ = socket.recv_fds(connection, 8, 3)
            command = _Command(connection, {}, fds)
            command.request = json.loads(_read(connection, int.from_bytes(header, "big")))
            connection.settimeout(None)
            self.waiting.append(command)
        except (OSError, ValueError):  # not a command: `running` connects to see whether a server answers
            connection.close()

    def _is_ready(self, command: _Command) -> bool:
        needs = "dvc" if command.request["argv"][0] == "dvc" else ""
        return not any(item.startswith(needs) for item in self.to_import)

    def _start(self, command: _Command) -> None:
        if command.has_lost_client() or (command.request["argv"][0] == "srpo" and not _cuda_survives_fork()):
            command.close()
            return
        gc.freeze()  # a collection in a child would copy every page
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until the child has its own handlers
        command.pid = os.fork()
        if not command.pid:
            self._become(command)
        os.setpgid(command.pid, command.pid)  # also in the child: the first call counts
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        for fd in command.fds:
            os.close(fd)
        command.fds = []
        self.running.append(command)
        self.selector.register(command.connection, selectors.EVENT_READ, lambda: self._forward_signals(command))
        with contextlib.suppress(OSError):
            command.connection.send(STARTED)

    def _become(self, command: _Command) -> None:
        """Run the command in the forked child, and exit."""
        code = 1
        try:
            os.setpgid(0, 0)
            self.end_with_parent()
            signal.set_wakeup_fd(-1)
            for number in (*FORWARDED, signal.SIGCHLD):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            for target, fd in enumerate(command.fds):
                os.dup2(fd, target)
            for other in (*self.running, *self.waiting, command):
                other.close()  # else clients would wait for this child when the server has ended
            self.listener.close()
            self.selector.close()
            os.environ.clear()
            os.environ.update(command.request["environ"])
            os.chdir(command.request["cwd"])
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(line_buffering=True)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed()  # `random` reseeds itself after a fork
            gc.enable()
            code = run_inline(command.request["argv"])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)

    def _forward_signals(self, command: _Command) -> None:
        try:
            numbers = command.connection.recv(16)
        except OSError:
            numbers = b""
        if not numbers:  # the client was killed
            self.selector.unregister(command.connection)
            numbers = bytes([signal.SIGKILL])
        for number in numbers:
            command.signal_group(number)

    def _reap(self) -> None:
        os.read(self.wake, 4096)
        for command in list(self.running):
            pid, status = os.waitpid(command.pid, os.WNOHANG)
            if not pid:
                continue
            self.running.remove(command)
            command.signal_group(signal.SIGKILL)  # children that it left in its group
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(command.connection)
            with contextlib.suppress(OSError):
                command.connection.send(bytes([code if code >= 0 else 128 - code]))
            command.close()


def _import(item: str) -> None:
    module, _, attribute = item.partition(":")
    try:
        loaded = importlib.import_module(module)
        if attribute:
            getattr(loaded, attribute)
    except Exception as error:  # a stage that needs it reports it
        print(f"srpo: fork server: {item}: {error}", file=sys.stderr)


def _cuda_survives_fork() -> bool:
    """Return False if something has initialized CUDA, so that a forked child could not use the GPUs."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.device_count():
        return True
    probe = os.fork()
    if not probe:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(probe, 0)[1] == 0


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the client has disconnected")
        data += part
    return data


if __name__ == "__main__":
    try:
        Server(sys.argv[1]).run()
    finally:
        os._exit(0)  # without finalizers, in which triton prints about leaks
