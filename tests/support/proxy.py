"""A TCP proxy on loopback that can be slow, dead, or lose the answer to a request that was carried out."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

METHODS = (b"GET", b"POST", b"PUT", b"PATCH", b"DELETE")


class Proxy:
    """Stands before a server on loopback.

    `delay` seconds pass before each piece of data goes on, either way. While `down`, connections are reset. `loses` is
    asked at every answer, by number from 1, whether it is lost: the server has done what it was asked, and the client
    sees the connection end. `requests` are the method and path of each request so far.
    """

    def __init__(self, target: int) -> None:
        self.target, self.delay, self.down, self.answers = target, 0.0, False, 0
        self.requests: list[str] = []
        self.loses: Callable[[int], bool] = lambda number: False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def fall(self) -> None:
        """Go down, and cut what is under way."""
        self.down = True
        for connection in list(self._open):
            _shut(connection)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.fall()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self.down:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    client.close()
                    continue
                self._open |= {client, server}
                for source, sink, answers in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._carry, args=(source, sink, answers), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                if not answers and data.split(b" ", 1)[0] in METHODS:
                    self.requests.append(b" ".join(data.split(b" ", 2)[:2]).decode())
                if answers and data.startswith(b"HTTP/"):  # the first piece of an answer
                    self.answers += 1
                    if self.loses(self.answers):
                        break
                sink.sendall(data)
        for end in (source, sink):
            _shut(end)
            self._open.discard(end)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
