"""Access to the review server: for a browser that was given the token, on this machine, from the server's own pages.

A web page elsewhere can make a browser send requests to loopback, and can point a host name of its own at 127.0.0.1
(DNS rebinding). So the Host header must name loopback, decisions must come from the server's own origin, and everything
needs the token, which the first visit turns into a cookie that other sites' requests don't carry.
"""

from __future__ import annotations

import os
import re
import secrets
from hmac import compare_digest
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# any port: a tunnel may end on another one
LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?")
BODY_BYTES = 1 << 16
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses what is not from the reviewer's browser, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, and pass on any other."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in HEADERS.items():
                        headers[name] = value
                    headers.setdefault("Cache-Control", "no-store")
                await send(message)

            await (self._refusal(Request(scope)) or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not LOOPBACK.fullmatch(host):
            return PlainTextResponse("this server answers on loopback only", 421)
        if request.method == "POST":
            if request.headers.get("origin") not in (f"http://{host}", f"https://{host}"):
                return PlainTextResponse("decisions come from this server's own pages only", 403)
            if request.headers.get("content-type", "").split(";")[0] != "application/json":
                return PlainTextResponse("a decision is sent as application/json", 415)
            length = request.headers.get("content-length", "")
            if not length.isdigit() or int(length) > BODY_BYTES:
                return PlainTextResponse("too long for a decision", 413)
        elif request.method not in ("GET", "HEAD"):
            return PlainTextResponse("method not allowed", 405)
        given = request.query_params.get("token")
        if given is not None and request.method == "GET" and self._is_token(given):
            response = RedirectResponse(
                str(request.url.remove_query_params("token").replace(scheme="", netloc="")), 303
            )
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        if not self._is_token(request.cookies.get(self.cookie, "")):
            return PlainTextResponse("open the address that `srpo review` printed", 403)
        return None

    def _is_token(self, text: str) -> bool:
        return compare_digest(text.encode(), self.token.encode())


def project_token(root: Path) -> str:
    """Return the project's token, made at first use and readable by its user only.

    It outlives the server, so a page that is open goes on after a restart.
    """
    path = root / ".srpo" / "review-token"
    path.parent.mkdir(exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        if token := path.read_text(encoding="ascii").strip():
            return token
        path.unlink()  # of a process killed between making and writing it
        return project_token(root)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(token := secrets.token_urlsafe(24))
    return token
