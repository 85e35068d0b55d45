"""A fork server that has imported everything, so that a stage's process starts in milliseconds.

Importing torch, diffusers, transformers and PEFT takes 15 to 30 s on two slow cores, and a campaign runs a
dozen or more stage processes. The driver starts this server once; `srpo` and `dvc` commands that find its
socket in `SRPO_WARM` hand it their arguments, folder, environment and standard streams and return the exit
code of the child it forks. Without the server each command runs in its own process, with the same result.

The server touches no device and runs no parallel torch operation: threads do not survive a fork. What a
library reads from the environment while it is imported is the server's, the rest is each command's own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOCKET_VARIABLE = "SRPO_WARM"
PRELOAD_VARIABLE = "SRPO_WARM_PRELOAD"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# module, or module:attribute where a library loads lazily
PRELOAD = (
    "dvc.cli", "dvc.repo", "dvc.commands.repro", "dvc.stage.run", "dvc.repo.reproduce", "dvc.dependency.param",
    "polars", "pyarrow.parquet", "PIL.Image", "jinja2", "matplotlib.figure", "rich.table",
    "srpo.cli", "srpo.select", "srpo.report", "srpo.tracking", "srpo.summary",
    "mlflow.tracking:MlflowClient", "mlflow.store.tracking.sqlalchemy_store",
    "torch", "diffusers:StableDiffusionXLPipeline", "diffusers:UNet2DConditionModel", "diffusers:AutoencoderKL",
    "diffusers:EulerDiscreteScheduler", "diffusers:DDPMScheduler", "transformers:CLIPTextModel",
    "transformers:CLIPTextModelWithProjection", "transformers:CLIPTokenizer", "transformers:CLIPModel",
    "transformers:CLIPProcessor", "transformers:CLIPImageProcessor", "peft", "cleanfid.fid",
    "srpo.generate", "srpo.score", "srpo.train", "srpo.evaluate", "srpo.rewards.clip", "srpo.rewards.templates",
)  # fmt: skip


def hand_over(command: list[str]) -> int | None:
    """Let the warm server run `command` (`srpo ...` or `dvc ...`) with this process's streams.

    Returns:
        Its exit code, 128 + n when signal n ended it, or None when no server answers.
    """
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        request = json.dumps({"argv": command, "cwd": str(Path.cwd()), "environ": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        child = _read_int(connection)
    except OSError:
        return None

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        return _read_int(connection)
    except OSError:
        return 128 + signal.SIGKILL


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Run a warm server while the block runs; one that is already there is used instead."""
    if os.environ.get(SOCKET_VARIABLE):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="srpo-") as folder:  # short: a socket's path has 107 bytes
        path = str(Path(folder, "warm"))
        server = subprocess.Popen([sys.executable, "-m", "srpo.warm", "serve", path], stdin=subprocess.PIPE)
        while not Path(path).exists() and server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        os.environ[SOCKET_VARIABLE] = path
        try:
            yield
        finally:
            del os.environ[SOCKET_VARIABLE]
            server.stdin.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def serve(path: str) -> None:
    """Listen on `path`, import everything, then fork for each command until standard input closes."""
    import gc
    import selectors

    listener = socket.socket(socket.AF_UNIX)
    old_mask = os.umask(0o077)
    listener.bind(path)
    os.umask(old_mask)
    listener.listen(64)  # commands that come during the imports wait here
    _preload()
    gc.collect()
    gc.freeze()
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches each command through its own client
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, sys.stdin, wake):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:  # the driver is gone
                    for child in children:
                        _kill_group(child)
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    child = _fork(connection, listener)
                    if child:
                        children[child] = connection
                        selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj == wake:
                    os.read(wake, 4096)
                    _reap(children, selector)
                else:  # a client says nothing more while it lives: it is gone
                    selector.unregister(key.fileobj)
                    for child, connection in children.items():
                        if connection is key.fileobj:
                            _kill_group(child)


def _preload() -> None:
    for item in os.environ.get(PRELOAD_VARIABLE, " ".join(PRELOAD)).split():
        module, _, attribute = item.partition(":")
        try:
            loaded = importlib.import_module(module)
            if attribute:
                getattr(loaded, attribute)
        except Exception as error:  # a stage that needs it will say so in its own words
            print(f"srpo: warm: {item}: {error}", file=sys.stderr)


def _fork(connection: socket.socket, listener: socket.socket) -> int | None:
    try:
        header, fds, _, _ = socket.recv_fds(connection, 8, 3)
        request = json.loads(_read(connection, int.from_bytes(header, "big")))
    except (OSError, ValueError):
        connection.close()
        return None
    child = os.fork()
    if child:
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(OSError):
            connection.sendall(child.to_bytes(8, "big", signed=True))
        return child
    listener.close()
    connection.close()
    _become(request, fds)
    return None


def _become(request: dict, fds: list[int]) -> None:
    """In the forked child: be the command. Does not return."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        os.environ.clear()
        os.environ.update(request["environ"])
        os.chdir(request["cwd"])
        sys.argv = request["argv"]
        code = run_here(request["argv"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_here(argv: list[str]) -> int:
    """Run a `srpo` or `dvc` command in this process and return its exit code."""
    module, function = {"srpo": ("srpo.cli", "run"), "dvc": ("dvc.cli", "main")}[argv[0]]
    return getattr(importlib.import_module(module), function)(argv[1:])


def _reap(children: dict[int, socket.socket], selector) -> None:
    for child in list(children):
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            continue
        connection = children.pop(child)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big", signed=True))
        connection.close()


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the warm server is gone")
        data += part
    return data


def _read_int(connection: socket.socket) -> int:
    return int.from_bytes(_read(connection, 8), "big", signed=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        outcome = hand_over(sys.argv[1:])
        sys.exit(run_here(sys.argv[1:]) if outcome is None else outcome)
