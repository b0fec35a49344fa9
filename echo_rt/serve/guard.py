"""What a request must be before the application sees it: from a known place, with the token, and small."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "echo_rt_token"
_OPEN = {"/healthz", "/readyz"}
_POLICY = b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'"
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


@dataclass(frozen=True)
class Rules:
    """``token``: None for a server that only this machine reaches; ``hosts``: names that may stand in ``Host``."""

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    most_body: int = 64 << 10  # bytes
    body_seconds: float = 10.0


class Guard:
    """ASGI middleware that refuses by :class:`Rules`, reads bodies whole within their bounds, and adds headers."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or WebSocket."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal, body = self._refuse(HTTPConnection(scope)), bytearray()
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it was accepted: a plain 403
            return
        if refusal is None:
            try:
                refusal = await asyncio.wait_for(self._read(Request(scope, receive), body), self._rules.body_seconds)
            except asyncio.TimeoutError:
                refusal = _error(408, f"expected the whole body within {self._rules.body_seconds:g} seconds")
            except ClientDisconnect:
                return
        parts = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def whole() -> Message:
            return parts.pop() if parts else await receive()

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await (refusal or self._app)(scope, whole, with_headers)

    def _refuse(self, connection: HTTPConnection) -> Response | None:
        headers, path = connection.headers, connection.scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._known(_split(f"//{host}").hostname or ""):
            return _error(421, f"expected this server's name in Host, found {host[:80]!r}")
        if origin is not None and _split(origin).netloc != host:
            return _error(403, f"expected a request of this server's own page, found one of {origin[:80]!r}")
        token = self._rules.token
        if token is None or path in _OPEN:
            return None
        asked = connection.query_params.get("token", "")
        given = (headers.get("authorization", "").removeprefix("Bearer "), connection.cookies.get(COOKIE, ""), asked)
        if not any(hmac.compare_digest(one.encode(), token.encode()) for one in given):
            return _error(401, "expected the token that the server printed: open its address with ?token=TOKEN")
        if asked and path == "/":  # once: it leaves the address bar and the history
            rest = connection.url.remove_query_params("token").query
            answer = RedirectResponse(f"/?{rest}".rstrip("?"), 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=connection.url.scheme == "https")
            return answer
        return None

    def _known(self, name: str) -> bool:
        # A page that was rebound to this address still has its own name in Host; a number cannot be rebound.
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name == "localhost" or name in self._rules.hosts

    async def _read(self, request: Request, body: bytearray) -> Response | None:
        """Read the whole ``body``; returns the refusal of one that is too long."""
        most = self._rules.most_body
        too_long = _error(413, f"expected a body of {most} bytes at most")
        if int(request.headers.get("content-length", "0")) > most:
            return too_long
        async for part in request.stream():
            body += part
            if len(body) > most:
                return too_long
        return None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        return urlsplit("")


def _error(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status, headers={"connection": "close"})
