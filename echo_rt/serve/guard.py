"""What a request must be before the application sees it: from a known place, with the token, and small."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "echo_rt_token"
_OPEN = {"/healthz", "/readyz"}
_POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


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
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refuse(scope, headers)
        if refusal is None and scope["type"] == "http":
            found = await self._read(headers, receive)
            if isinstance(found, Response):
                refusal = found
            else:
                receive = found
        if refusal is None:
            await self._app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it was accepted: a plain 403

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if not self._known(host):
            return _error(421, f"expected this server's name in Host, found {host[:80]!r}")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _error(403, f"expected a request of this server's own page, found one of {origin[:80]!r}")
        token = self._rules.token
        if token is None or scope["path"] in _OPEN:
            return None
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        cookie = SimpleCookie(headers.get("cookie", "")[:4096]).get(COOKIE)
        given = (headers.get("authorization", "").removeprefix("Bearer "), cookie.value if cookie else "", asked)
        if not any(hmac.compare_digest(one.encode(), token.encode()) for one in given):
            return _error(401, "expected the token that the server printed: open its address with ?token=TOKEN")
        if asked and scope["path"] == "/":  # once: it leaves the address bar and the history
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=scope["scheme"] == "https")
            return answer
        return None

    def _known(self, host: str) -> bool:
        # A page that was rebound to this address still has its own name in Host; a number cannot be rebound.
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or name in self._rules.hosts
        return True

    async def _read(self, headers: dict[str, str], receive: Receive) -> Receive | Response:
        """Read the body; returns what gives it to the application, or a refusal."""
        too_long = _error(413, f"expected a body of {self._rules.most_body} bytes at most")
        if int(headers.get("content-length", "0")) > self._rules.most_body:
            return too_long
        body = bytearray()

        async def whole() -> bool:
            while True:
                message = await receive()
                body.extend(message.get("body", b""))
                if len(body) > self._rules.most_body or not message.get("more_body"):
                    return len(body) <= self._rules.most_body

        try:
            if not await asyncio.wait_for(whole(), self._rules.body_seconds):
                return too_long
        except asyncio.TimeoutError:
            return _error(408, f"expected the whole body within {self._rules.body_seconds:g} seconds")
        read = False

        async def once() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return once


def _error(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status, headers={**_HEADERS, "connection": "close"})


def _with_headers(send: Send) -> Send:
    extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def wrapped(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return wrapped
