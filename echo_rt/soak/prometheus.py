"""The figures of the newest line, served over HTTP for Prometheus. prometheus-client is an optional dependency."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from http.server import HTTPServer
from typing import Any

from echo_rt.errors import ConfigError
from echo_rt.soak.checks import Status, Verdict
from echo_rt.soak.journal import Line
from echo_rt.utils.atomic_file import raising
from echo_rt.utils.packages import needing

_PREFIX = "echo_rt_soak"
_NOT_FIGURES = {"bins", "hashes", "mismatches", "misplaced"}
_CONNECTION_SECONDS = 2.0
_VALUES = {Status.KEPT: 1.0, Status.BROKEN: 0.0, Status.UNCHECKED: math.nan}


def figures(line: Mapping[str, Any], prefix: str = _PREFIX) -> Iterator[tuple[str, float]]:
    """Yield every number of a line under the name of its path, ``echo_rt_soak_latency_p99``; NaN for null."""
    for name, value in line.items():
        path = f"{prefix}_{name}"
        if name in _NOT_FIGURES:
            continue
        if isinstance(value, Mapping):
            yield from figures(value, path)
        elif value is None or isinstance(value, (int, float)):
            yield path, math.nan if value is None else float(value)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class _Server(HTTPServer):
    """One connection at a time, for a short time, on one thread: whoever is silent takes nothing from the stream."""

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = socket.getaddrinfo(*address)[0][0]
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer; when the time is over, the connection reads and writes its end."""
        late = threading.Timer(_CONNECTION_SECONDS, _end, [request])
        late.start()
        try:
            super().process_request(request, client_address)
        finally:
            late.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a reader that has left."""


class Exporter:
    """A :class:`Watcher` that serves from the moment it is made. ``port`` 0 takes a free one, which :attr:`port` names.

    :class:`BackendError` without prometheus-client, :class:`ConfigError` for an address that cannot be served at.
    """

    def __init__(self, address: str, port: int) -> None:
        with needing("prometheus-client", "--port"):
            from prometheus_client import CollectorRegistry, Gauge, MetricsHandler
        registry = CollectorRegistry()
        self._gauge = cache(partial(Gauge, registry=registry))
        self._promise = Gauge(f"{_PREFIX}_promise", "1 kept, 0 broken, NaN not checked", ["promise"], registry=registry)
        self.block_done(0, 0, math.nan)
        with raising(ConfigError, f"--port: cannot serve at {address}:{port}"):
            self._server = _Server((address, port), MetricsHandler.factory(registry))
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="echo-rt figures", daemon=True)
        self._thread.start()

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """Serve the newest block."""
        self._gauge(f"{_PREFIX}_current_block", "number of the newest block").set(block)
        self._gauge(f"{_PREFIX}_current_frames", "frames of video so far").set(frames)
        self._gauge(f"{_PREFIX}_current_block_seconds", "how long the newest block took").set(seconds)

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """Serve the newest line."""
        for name, value in figures(line):
            self._gauge(name, "of the newest line of soak.jsonl").set(value)
        for verdict in verdicts:
            self._promise.labels(verdict.promise).set(_VALUES[verdict.status])

    def close(self) -> None:
        """Stop serving; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
