"""A server in this process with the smallest model, and what asks it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from streaming import PROMPT, load, take
from websockets.sync.client import connect as _connect

import echo_rt
from echo_rt.client import Live
from echo_rt.serve.app import make_app
from echo_rt.serve.guard import Rules
from echo_rt.serve.live import LiveSession
from echo_rt.serve.server import listen, make_server

LONG = 60.0  # seconds; only a deadlock takes that long
connect = partial(_connect, open_timeout=LONG)
QUICK = 60  # frames a second: a block is shown in a fifth of a second


@dataclass
class Served:
    """A server that runs; ``live`` asks it."""

    session: LiveSession
    port: int
    live: Live
    model: Path

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request, as it is; header names have _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a command."""
        status, _, answer = self.ask(
            "POST", f"/api/sessions/main{path}", json.dumps(body), Content_Type="application/json"
        )
        return status, json.loads(answer)

    def wait_block(self, block: int) -> None:
        """Return once the block is shown, or one after it."""
        for event in self.live.events():
            if event.get("block", -1) >= block and event["type"] in ("hello", "block"):
                return


@contextmanager
def served(
    model: Path,
    folder: Path,
    *,
    rules: Rules | None = None,
    resume: bool = False,
    most_viewers: int = 8,
    port: int = 0,
    **live: Any,
) -> Iterator[Served]:
    """Serve a model's live video at 127.0.0.1, by default at a free port, to the end of the context."""

    def runtime(memory: str | None, like: Any) -> echo_rt.Runtime:
        return load(model, memory=memory, like=like)

    session = LiveSession(runtime, folder, PROMPT, resume=resume)
    app = make_app({"main": session}, rules or Rules(), most_viewers=most_viewers)
    listener = listen("127.0.0.1", port)
    server = make_server(app, most_connections=8 * most_viewers)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = listener.getsockname()[1]
    try:
        with Live(f"http://127.0.0.1:{port}", timeout=LONG, **live) as client:
            yield Served(session, port, client, model)
    finally:
        server.should_exit = True
        thread.join(LONG)
    assert not thread.is_alive(), "the server does not end"
    assert not session._thread.is_alive() and session._runtime._engine is None


def until(true: Any) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def plain(model: Path, blocks: int, *switches: tuple[int, str], seed: int = 0, prompt: str = PROMPT) -> list[Any]:
    """The blocks of a video without a server: frames as bytes."""
    with load(model) as runtime, runtime.stream(prompt, seed=seed) as stream:
        for block, text in switches:
            stream.set_prompt(text, block=block)
        return [chunk.frames.numpy().tobytes() for chunk in take(stream, blocks)]


def half_open(port: int, sent: bytes = b"") -> socket.socket:
    """A connection on which no whole request is sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=LONG)
    connection.sendall(sent)
    return connection
