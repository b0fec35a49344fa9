"""The server: uvicorn, with bounds on connections and on how long a request may be half open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from echo_rt.errors import ConfigError
from echo_rt.utils.atomic_file import reason

_END_SECONDS = 2
_HEADER_BYTES = 16 << 10
_MESSAGE_BYTES = 64 << 10  # of a WebSocket, from a client
_MOST_HALF_OPEN = 64
_HALF_OPEN_SECONDS = 10.0
_GRACE_SECONDS = 0.5  # in which a request can arrive: viewers who come together are no attack


def bounded_protocol(most: int) -> type[H11Protocol]:
    """Make uvicorn's HTTP protocol with at most ``most`` connections.

    A connection is half open until the headers of a request are whole. It may be so for a time, and the oldest such
    ones are closed when there are too many: so those who send nothing keep out nobody.
    """
    waiting: dict[H11Protocol, asyncio.TimerHandle] = {}

    class Bounded(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > most:
                next(iter(waiting)).transport.abort()
            elif len(waiting) > _MOST_HALF_OPEN:
                self.loop.call_later(_GRACE_SECONDS, self._make_room)

        def connection_lost(self, exc: Exception | None) -> None:
            self._over()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self not in waiting and (self.cycle is None or self.cycle.response_complete):
                self._wait()  # the next request of a connection that was kept alive
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._over()

        def handle_websocket_upgrade(self, event: Any) -> None:
            self._over()
            super().handle_websocket_upgrade(event)

        def _wait(self) -> None:
            waiting[self] = self.loop.call_later(_HALF_OPEN_SECONDS, lambda: self.transport.abort())

        def _make_room(self) -> None:
            for oldest in list(waiting)[: max(0, len(waiting) - _MOST_HALF_OPEN)]:
                oldest.transport.abort()

        def _over(self) -> None:
            if self in waiting:
                waiting.pop(self).cancel()

    return Bounded


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket; port 0 takes a free one. :class:`ConfigError` where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(f"cannot serve at {host}:{port}: {reason(error)}") from None


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Say at once what the next seconds are for, as :class:`echo_rt.utils.signals.StopRequest` does."""
        with contextlib.suppress(OSError):
            os.write(2, b"\necho-rt: stopping: writing a snapshot\n")
        super().handle_exit(sig, frame)


def make_server(app: FastAPI, *, most_connections: int = 512) -> uvicorn.Server:
    """Make the server; ``run([listener])`` serves until SIGINT or SIGTERM, and ends within seconds.

    The signal is raised once more after that, for the handler that was there before.
    """
    config = uvicorn.Config(
        app,
        http=bounded_protocol(most_connections),
        ws="websockets-sansio",
        ws_max_size=_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_END_SECONDS,
        log_level="error",
        server_header=False,
    )
    return _Server(config)
