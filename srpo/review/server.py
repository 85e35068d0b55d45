"""The review server: one process on loopback."""

from __future__ import annotations

import errno
import socket

from srpo.errors import BlockedError, UserError
from srpo.rounds import Round

HOST = "127.0.0.1"


def serve(round: Round, against: str, port: int) -> None:
    """Serve the review pages of a round until interrupted. Port 0 takes any free one.

    Raises:
        UserError: a file of the round is missing or damaged, or the server's libraries are not installed.
        BlockedError: the port is taken.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"srpo review needs {error.name}: pip install 'srpo[review]'") from None
    from srpo.review.app import create_app
    from srpo.review.security import project_token

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at once after a restart
        try:
            listening.bind((HOST, port))
        except OSError as error:
            reason = "taken" if error.errno == errno.EADDRINUSE else error.strerror
            raise BlockedError(f"port {port}: {reason}; name another with --port") from None
        port = listening.getsockname()[1]
        token = project_token(round.root)
        app = create_app(round, against, token, f"srpo-review-{port}")
        listening.listen()  # early requests wait instead of being refused
        print(f"http://{HOST}:{port}/?token={token}", flush=True)
        print("open this address in a browser on this machine; Ctrl-C ends", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listening])
