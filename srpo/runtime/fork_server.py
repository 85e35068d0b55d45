"""An optional server that has imported everything and forks a process per command, which starts in milliseconds.

Importing torch, diffusers, transformers, PEFT and MLflow takes 10 to 50 s on two slow cores, and a campaign runs dozens
of `srpo` and `dvc` processes. That matters for the tiny demo and little else, so the server runs only on request: with
`SRPO_WARM=1` or `--warm`, the flow starts one. Commands that find its socket in `SRPO_FORK_SERVER` send it their
arguments, folder, environment and standard streams, and return the exit code of the child that it forks. Without a
server, and on systems other than Linux, each command runs in its own process.

The server imports and does nothing else: it touches no device and computes nothing, because neither a CUDA context nor
a thread survives a fork (a child of a process that has *used* Polars or OpenMP hangs). Variables that libraries read
while they are imported (HF_HUB_OFFLINE, OMP_NUM_THREADS) are the server's; all others are those of the command.
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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srpo.runtime.processes import end_with_parent

REQUEST_VARIABLE = "SRPO_WARM"
SOCKET_VARIABLE = "SRPO_FORK_SERVER"
PRELOAD_VARIABLE = "SRPO_FORK_SERVER_PRELOAD"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STARTED = b"+"

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


def submit(command: list[str]) -> int | None:
    """Have the server run `command` (`srpo ...` or `dvc ...`) with this process's streams, and wait for its end.

    Returns:
        Its exit code, 128 + n if signal n ended it, or None if no server accepted it.
    """
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    request = json.dumps({"argv": command, "cwd": str(Path.cwd()), "environ": dict(os.environ)}).encode()
    try:
        connection.connect(path)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        if connection.recv(1) != STARTED:
            return None
    except OSError:
        return None

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    for number in FORWARDED:
        signal.signal(number, forward)
    code = b""
    with contextlib.suppress(ConnectionError):
        code = connection.recv(1)
    if not code:  # the server was killed, and the kernel killed the command with it
        print("srpo: the fork server was killed", file=sys.stderr)
    return code[0] if code else 128 + signal.SIGKILL


def if_requested() -> contextlib.AbstractContextManager[None]:
    """Return `running()` if SRPO_WARM=1, else a context manager that does nothing."""
    return running() if os.environ.get(REQUEST_VARIABLE) == "1" else contextlib.nullcontext()


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a server while the block runs; a server that runs already is used instead."""
    if sys.platform != "linux" or _accepts_connections(os.environ.get(SOCKET_VARIABLE)):
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="srpo-", ignore_cleanup_errors=True
    ) as folder:  # the path of a socket must be short
        path = str(Path(folder, "socket"))
        # its own session: Ctrl-C reaches each command through its client only
        server = subprocess.Popen(
            [sys.executable, "-m", "srpo.runtime.fork_server", "serve", path],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        while not Path(path).exists() and server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.02)
        os.environ[SOCKET_VARIABLE] = path
        try:
            yield
        finally:
            os.environ.pop(SOCKET_VARIABLE, None)
            server.terminate()
            try:
                server.wait(15)  # the signal is handled after the current import
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if server.stdin:
                server.stdin.close()


def run_inline(argv: list[str]) -> int:
    """Run a `srpo` or `dvc` command in this process and return its exit code."""
    module, function = {"srpo": ("srpo.cli", "run"), "dvc": ("dvc.cli", "main")}[argv[0]]
    sys.argv = list(argv)
    return getattr(importlib.import_module(module), function)(argv[1:])


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


def _accepts_connections(path: str | None) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        if path:
            connection.connect(path)
            return True
    return False


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the client has disconnected")
        data += part
    return data


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        try:
            Server(sys.argv[2]).run()
        finally:
            os._exit(0)  # without finalizers, in which triton prints about leaks
    else:
        exit_code = submit(sys.argv[1:])
        sys.exit(run_inline(sys.argv[1:]) if exit_code is None else exit_code)
