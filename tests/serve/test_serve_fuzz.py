"""What clients send, what lies in a server's folder, what a server answers: taken, or refused in one line."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
import torch
from fuzzing import ANYTHING, as_json, changed, damaged, one_line, slow
from hypothesis import example, given
from hypothesis import strategies as st
from serving import LONG, Served, connect
from starlette.websockets import WebSocket
from streaming import OTHER, PROMPT
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from echo_rt import client as client_module
from echo_rt.client import Live
from echo_rt.errors import EchoError, SnapshotError, StreamError
from echo_rt.options import check_seed
from echo_rt.serve.app import COMMANDS
from echo_rt.serve.realtime import Realtime
from echo_rt.serve.session import Block, checked_prompt
from echo_rt.serve.shelf import Notes, Shelf
from echo_rt.snapshot.snapshot import Snapshot

BODIES: dict[str, dict[str, Any]] = {
    "/prompts": {"text": OTHER, "over": 2},
    "/pause": {"paused": False},
    "/restart": {"seed": 3, "prompt": PROMPT, "memory": "evolve"},
    "/resume": {"snapshot": "20260101-000000000-block-3"},
    "/offer": {"sdp": "v=0\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\n"},
}
COMMAND_PATHS = [(method, path) for method, path, *_ in COMMANDS] + [("POST", "/offer")]
HEADERS = {"content-type": "application/json", "origin": "null", "cookie": "a=b", "authorization": "Bearer x"}


@pytest.fixture
def unbroken(server: Served) -> Iterator[Served]:
    """The server; whatever it did not expect fails the test, and it still plays at the end."""
    unexpected: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: unexpected.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        yield server
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert not unexpected, unexpected
    server.post("/pause", paused=False)
    assert server.post("/restart", seed=1, prompt=PROMPT, memory="evolve")[0] == 200
    assert server.live.get("/figures")["failure"] is None


def bodies(path: str) -> st.SearchStrategy[bytes]:
    whole = BODIES.get(path, {})
    return (changed(whole) | st.just(whole) | ANYTHING).map(as_json) | damaged(as_json(whole)) | st.binary(max_size=50)


TEXTS = st.text(max_size=20) | st.sampled_from(["..", "../..", "main", "x" * 300, "[", "\ud800"])
PATHS = TEXTS.map(lambda text: quote(text.encode(errors="surrogatepass"), safe=""))
HEADER_VALUES = st.dictionaries(st.sampled_from(sorted(HEADERS)), st.text('\t !"#~aZ09éÿ[]=;,/', max_size=20))


@slow
@given(data=st.data())
def test_requests(unbroken: Served, data: st.DataObject) -> None:
    method, path = data.draw(st.sampled_from(COMMAND_PATHS))
    body = data.draw(bodies(path)) if method == "POST" else b""
    name = data.draw(st.just("main") | PATHS)
    path = f"/api/sessions/{name}{path}{data.draw(st.just('') | PATHS.map(lambda text: f'/{text}'))}"
    headers = {**HEADERS, "origin": f"http://127.0.0.1:{unbroken.port}"} | data.draw(HEADER_VALUES)
    connection = http.client.HTTPConnection("127.0.0.1", unbroken.port, timeout=LONG)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name: value.encode("latin-1") for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
    assert answer.status < 500 and len(content) < 100_000, content
    if answer.status >= 400:
        one_line(ValueError(json.loads(content)["detail"]))


MESSAGES = st.text(max_size=20) | st.binary(max_size=20) | ANYTHING.map(lambda value: as_json(value).decode())
AFTER = st.sampled_from(["", "&after=-1", "&after=0", "&after=x", f"&after={2**70}", f"&after={'9' * 5000}"])


@slow
@given(path=st.sampled_from(["events?", "video?format=h264", "video?format=x"]), after=AFTER, said=st.lists(MESSAGES))
@example(path="events?", after="", said=[b"\x00", "{", '{"ping": NaN}', '{"ping": 1e999}'])
def test_messages_of_viewers(unbroken: Served, path: str, after: str, said: list[str | bytes]) -> None:
    place = f"ws://127.0.0.1:{unbroken.port}/api/sessions/main/{path}{after}"
    with contextlib.suppress(ConnectionClosed, InvalidHandshake), connect(place) as viewer:
        for message in said:
            viewer.send(message)
        viewer.send('{"ping": 7}')
        viewer.recv(LONG)


# ---- as SGLang's

INIT = {"type": "init", "prompt": PROMPT, "seed": 3, "size": "32x32", "max_chunks": 1, "realtime_output_format": "raw"}
EVENT = {"type": "event", "kind": "prompt", "payload": {"prompt": OTHER}, "event_id": 9}
PACKED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def packed(whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A message of a WebSocket: MessagePack, other bytes, a text."""
    data = (changed(whole, PACKED) | st.just(whole) | PACKED).map(msgspec.msgpack.encode)
    data |= damaged(msgspec.msgpack.encode(whole)) | st.binary(max_size=20)
    sent = data.map(lambda found: {"bytes": found}) | st.text(max_size=9).map(lambda found: {"text": found})
    return sent.map(lambda message: {"type": "websocket.receive", **message})


class NoVideo:
    """A session that checks what it is asked for as a live one does, and shows one block."""

    async def describe(self) -> dict[str, Any]:
        return {"size": [32, 32]}

    async def block(self, after: int) -> Block:
        return Block(0, 1, b"pixels", 0.1, after + 1)

    async def ask(self, command: str, **asked: Any) -> dict[str, Any]:
        checked_prompt(asked["text" if command == "prompt" else "prompt"])
        check_seed(asked.get("seed", 0))
        return {"block": 1}


@given(first=packed(INIT), events=st.lists(packed(EVENT), max_size=3))
@example(first={"type": "websocket.receive", "text": "{}"}, events=[])
def test_messages_of_a_real_time_client(first: dict[str, Any], events: list[dict[str, Any]]) -> None:
    messages = [{"type": "websocket.connect"}, first, *events]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Any) -> None:
        sent.append(message)

    socket = WebSocket({"type": "websocket", "path": "/", "headers": []}, receive, send)
    asyncio.run(Realtime(NoVideo()).generate(socket))  # type: ignore[arg-type]
    assert sent.pop(0)["type"] == "websocket.accept"
    assert sent and sent[-1]["type"] in ("websocket.close", "websocket.send")
    for message in sent:
        answer = message.get("bytes", b"")
        with contextlib.suppress(msgspec.DecodeError):  # pictures
            said = msgspec.msgpack.decode(answer)
            if isinstance(said, dict) and said.get("type") == "error":
                one_line(ValueError(said["content"]))


# ---- the shelf

NOTES = json.loads(msgspec.json.encode(Notes([{"text": PROMPT, "block": 0, "over": None, "asked": 1.5}], epoch=1.5)))
ENTRY = {"text": OTHER, "block": 3, "over": 2, "asked": 1.5}


SNAPSHOT = "20260101-000000000-block-1"
FILES = {"owner.json": "abc", "prompt-0000000001.json": ENTRY, f"{SNAPSHOT}.json": NOTES}


@given(data=st.data())
def test_what_lies_in_a_sessions_folder(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("shelf")
    Snapshot({"a": 1}, 1, 0, False, 3, {"t": torch.zeros(2)}, {}).save(folder / f"{SNAPSHOT}.safetensors")
    for name, content in FILES.items():
        value = data.draw(st.just(content) | changed(content) | ANYTHING)
        (folder / name).write_bytes(data.draw(st.just(as_json(value)) | damaged(as_json(value))))
    shelf = Shelf(folder, claim=False)
    changes: list[Any] = []
    for read in (
        lambda: shelf.open(SNAPSHOT)[1].prompts,
        lambda: list(shelf.logged(0)),
        lambda: [] if isinstance(shelf.read_json("owner.json", str), str) else None,
    ):
        try:
            changes += read()
        except EchoError as error:
            one_line(error)
    for change in changes:
        if not change.keys() <= {"paused", "recording"}:
            assert isinstance(change["text"], str) and change["block"] >= 0 and isinstance(change["over"], int | None)


def test_a_prompt_of_the_log_that_lost_its_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt-0000000001.json").write_bytes(as_json({key: ENTRY[key] for key in ("block", "over", "asked")}))
    with pytest.raises(SnapshotError, match="text"):
        list(Shelf(tmp_path, claim=False).logged(0))


def test_a_snapshot_without_its_notes_goes_on(server: Served) -> None:
    name = server.post("/snapshots")[1]["name"]
    (server.session._history.shelf._folder / f"{name}.json").unlink()
    assert server.post("/resume", snapshot=name)[0] == 200
    status, answer = server.post("/restart", seed=1)
    assert status == 422 and "expected a prompt, since none is known" in answer["detail"]
    assert server.post("/restart", seed=1, prompt=PROMPT)[0] == 200


# ---- the client


class Answering(httpx.BaseTransport):
    """A server that answers with anything."""

    def __init__(self, status: int, content: bytes) -> None:
        self._answer = status, content

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(self._answer[0], content=self._answer[1])


ANSWERS = ANYTHING.map(as_json) | st.binary(max_size=50) | st.just(b"[" * 3000)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live("http://127.0.0.1:9") as made:
        yield made


@given(status=st.integers(200, 599), content=ANSWERS)
@example(status=400, content=b"\n")
@example(status=200, content=b"[1]")
@example(status=200, content=b"\xff{")
def test_answers_to_the_client(live: Live, status: int, content: bytes) -> None:
    live._http._transport = Answering(status, content)
    try:
        assert isinstance(live.get("/figures"), dict)
    except StreamError as error:
        one_line(error)


@given(messages=st.lists(ANYTHING.map(lambda value: as_json(value).decode()) | MESSAGES, max_size=3))
def test_events_and_pictures_for_the_client(live: Live, messages: list[str | bytes]) -> None:
    class Socket:
        def __init__(self) -> None:
            self.left = list(messages)

        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def recv(self, timeout: float) -> str | bytes:
            if not self.left:
                raise ConnectionClosed(None, None)
            return self.left.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "connect", lambda *_, **__: Socket())
        for take in (live.events, live.frames):
            with pytest.raises(StreamError) as caught:
                for found in take():
                    assert isinstance(found, dict) or found.ndim == 3
            one_line(caught.value)
