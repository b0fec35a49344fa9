"""Who and what is refused, and that those who are slow or silent keep out nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import LONG, Served, connect, half_open, served, until
from streaming import OTHER
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.protocol import State

import echo_rt.serve.server as bounds
from echo_rt.errors import StreamError
from echo_rt.serve import viewers as viewers_module
from echo_rt.serve.guard import Rules
from echo_rt.serve.session import ParkedError, Picture
from echo_rt.serve.viewers import Channel, Viewer

FIGURES = "/api/sessions/main/figures"
TOKEN = "a-token+with/signs="


def closed(connection: socket.socket) -> bytes:
    """What came until the server closed the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("192.168.0.7", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_a_page_that_was_rebound_to_this_address_gets_nothing(server: Served, host: str, status: int) -> None:
    assert server.ask("GET", FIGURES, Host=host)[0] == status
    assert server.ask("GET", "/healthz", Host=host)[0] == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", "file://", "http://["])
def test_other_pages_get_nothing(server: Served, origin: str) -> None:
    for method, path in (("GET", FIGURES), ("POST", "/api/sessions/main/snapshots"), ("GET", "/")):
        assert server.ask(method, path, Origin=origin)[0] == 403
    for path in ("/api/sessions/main/video", "/api/sessions/main/events", "/v1/realtime_video/generate"):
        with pytest.raises(InvalidStatus) as refused, connect(f"ws://127.0.0.1:{server.port}{path}", origin=origin):  # type: ignore[arg-type]
            pass
        assert refused.value.response.status_code == 403
    assert server.ask("GET", FIGURES, Origin=f"http://127.0.0.1:{server.port}")[0] == 200


@pytest.fixture(scope="module")
def private(small_model: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Iterator[Served]:
    rules = Rules(TOKEN, frozenset({"live.example"}), most_body=5000, body_seconds=0.5)
    with served(small_model, tmp_path_factory.mktemp("private") / "out", rules=rules, token=TOKEN) as found:
        yield found


def test_without_the_token_only_health_is_answered(private: Served) -> None:
    private.wait_block(0)
    for path in ("/", FIGURES, "/metrics", "/openapi.json", "/page/page.js", "/docs"):
        assert private.ask("GET", path)[0] == 401, path
        assert private.ask("GET", path, Authorization="Bearer wrong")[0] == 401
        assert private.ask("GET", path, Cookie="echo_rt_token=wrong; a@b=\x7f")[0] == 401
    assert private.ask("GET", "/healthz")[0] == private.ask("GET", "/readyz")[0] == 200
    with pytest.raises(InvalidStatus, match="403"), connect(f"ws://127.0.0.1:{private.port}/api/sessions/main/video"):
        pass
    assert private.live.get("/figures")["state"] in ("playing", "starting")
    assert next(private.live.events())["type"] == "hello"
    header = f"Bearer {TOKEN}"
    assert private.ask("GET", FIGURES, Host="live.example", Authorization=header)[0] == 200
    assert private.ask("GET", FIGURES, Host="dead.example", Authorization=header)[0] == 421


def test_a_browser_keeps_the_token_in_a_cookie(private: Served) -> None:
    from urllib.parse import quote

    status, headers, _ = private.ask("GET", f"/?token={quote(TOKEN)}")
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert private.ask("GET", "/", Cookie=cookie.partition(";")[0])[0] == 200
    _, headers, _ = private.ask("GET", f"/?session=ann&token={quote(TOKEN)}")
    assert headers["location"] == "/?session=ann"


def test_a_long_body_is_refused_before_it_is_read(private: Served) -> None:
    private.ask("GET", "/healthz")
    head = f"POST /api/sessions/main/prompts HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    with half_open(private.port, head + b"Content-Length: 600000000\r\n\r\n") as connection:
        assert b" 413 " in closed(connection).split(b"\r\n")[0]
    with half_open(private.port, head + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
        try:
            for _ in range(1000):
                connection.sendall(chunk)
        except OSError:
            pass  # it was closed meanwhile
        else:
            pytest.fail("four megabytes were read")


def test_a_slow_body_is_given_up(private: Served) -> None:
    head = f"POST /api/sessions/main/prompts HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    with half_open(private.port, head + b'Content-Length: 100\r\n\r\n{"text"') as connection:
        assert b" 408 " in closed(connection).split(b"\r\n")[0]


def test_many_half_open_requests_keep_out_nobody(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_MOST_HALF_OPEN", 5)
    with served(small_model, tmp_path / "out") as server:
        silent = [half_open(server.port, b"GET / HT"[: number % 8]) for number in range(40)]
        assert server.ask("GET", FIGURES)[0] == 200
        until(lambda: sum(map(_is_closed, silent)) >= 35)
        for connection in silent:
            connection.close()


def test_many_who_come_at_once_are_all_answered(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_MOST_HALF_OPEN", 5)
    monkeypatch.setattr(bounds, "_GRACE_SECONDS", LONG)
    with served(small_model, tmp_path / "out") as server:
        together = [half_open(server.port, b"") for _ in range(40)]
        for connection in together:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert all(b" 200 OK" in closed(connection) for connection in together)
        for connection in together:
            connection.close()


def test_a_half_open_request_ends_by_itself(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_HALF_OPEN_SECONDS", 0.2)
    with served(small_model, tmp_path / "out") as server:
        with half_open(server.port, b"GET / HTTP/1.1\r\nHost:") as connection:
            assert closed(connection) == b""
        with half_open(server.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea") as connection:
            assert closed(connection).count(b" 200 OK") == 1  # and the second one, on the same connection, is not whole
        end = time.monotonic() + LONG
        while True:  # a busy machine may take longer to make the connection than it may be half open
            with (
                contextlib.suppress(ConnectionClosed, InvalidHandshake, EOFError),
                connect(f"ws://127.0.0.1:{server.port}/api/sessions/main/events") as events,
            ):
                assert json.loads(events.recv(LONG))["type"] == "hello"
                time.sleep(3 * bounds._HALF_OPEN_SECONDS)
                assert events.ping().wait(LONG) and events.protocol.state is State.OPEN  # a WebSocket stays
                return
            assert time.monotonic() < end


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_too_many_commands_at_once_are_429(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()
    encode = server.session._runtime.encode_prompt

    def slow(text: str) -> Any:
        begun.set()
        assert go.wait(LONG)
        return encode(text)

    monkeypatch.setattr(server.session._runtime, "encode_prompt", slow)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.post("/prompts", text=OTHER)[0])) for _ in range(30)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(LONG)
    until(lambda: len(answers) == 22)  # eight wait
    assert server.live.get("/figures")["block"] >= 0  # what is quick is still answered
    go.set()
    for thread in threads:
        thread.join(LONG)
    assert sorted(answers) == [200] * 8 + [429] * 22


def test_long_messages_of_a_websocket_end_it(server: Served) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/api/sessions/main/events", compression=None) as viewer:
        viewer.send("x" * 100_000)
        with pytest.raises(Exception, match="1009"):
            while True:
                viewer.recv(LONG)


def test_a_viewer_that_is_late_loses_pictures_not_others() -> None:
    async def trial() -> None:
        late, prompt = Viewer("h264"), Viewer("h264")
        for number in range(500):
            picture = Picture(number, number % 20 == 0, bytes(10), b"", False)
            late.offer(number, picture)
            prompt.offer(number, picture)
            assert (await prompt.get())[0] == number
        assert len(late._queue) <= 48 and late.dropped >= 440 and prompt.dropped == 0
        first, _ = await late.get()
        assert first % 20 == 0, "a player cannot begin with any other picture"

        heavy = Viewer("mp4")
        for number in range(40):
            heavy.offer(number, Picture(number, True, b"", bytes(1 << 20), True))
        assert heavy._bytes <= 4 << 20

    asyncio.run(trial())


class Parking:
    """A session that can be parked, and counts how often it was brought back. ``state``: as told while it is parked."""

    def __init__(self) -> None:
        self.parked, self.brought_back, self.place = False, 0, 0
        self.state = "waiting"  # its process ends a moment later

    async def wake(self) -> None:
        self.brought_back += self.parked
        self.parked = False

    async def next(self, after: int | None, audience: Any = None) -> list[Any]:
        await asyncio.sleep(0.005)
        if self.parked:
            raise ParkedError("parked")
        self.place += 1
        return [(self.place, Picture(self.place, True, b"picture", b"", False))]

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return {"state": self.state if self.parked else "playing"}


def test_a_parked_session_is_brought_back_by_who_comes_and_not_by_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers_module, "_AGAIN_SECONDS", 0.01)

    async def trial() -> None:
        session: Any = Parking()
        channel = Channel(session, 8)
        with channel.view("h264") as watching, channel.view("events") as listening:
            await watching.get()
            with channel.view("h264"):  # who comes a moment before was there too
                session.parked = True
                assert await listening.get() == {"type": "parked"}
            for session.state in ("waiting", "parked"):
                with channel.view("h264", after=session.place):  # who comes back, too
                    for _ in range(20):
                        await asyncio.sleep(0.01)
            assert session.parked and session.brought_back == 0, "a viewer that was there brings it back"
            with channel.view("h264") as late:
                await late.get()
            assert session.brought_back == 1
            watching._queue.clear()
            await watching.get()  # it goes on for those who were there
            session.parked = True
            assert await listening.get() == {"type": "parked"}
            session.parked = False  # brought back by somebody elsewhere
            watching._queue.clear()
            await watching.get()
            assert session.brought_back == 1
        session.parked = True
        with channel.view("h264") as first:
            await first.get()
        assert session.brought_back == 2

    asyncio.run(trial())


def test_errors_of_the_client_are_one_line() -> None:
    from echo_rt.client import Live

    with Live("http://127.0.0.1:1") as live, pytest.raises(StreamError, match="cannot be reached"):
        live.get("/figures")
