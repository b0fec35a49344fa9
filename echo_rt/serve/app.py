"""The HTTP and WebSocket API of live sessions, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from echo_rt.errors import ConfigError, EchoError
from echo_rt.serve.guard import Guard, Rules
from echo_rt.serve.realtime import Realtime
from echo_rt.serve.rtc import Peers
from echo_rt.serve.session import BusyError, Session, Sessions, soon
from echo_rt.serve.viewers import Channel, Kind, Viewer, send
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import printable

PAGE = Path(__file__).parent / "page"
_TRY_LATER, _MOST_REASON = 1013, 120  # of a WebSocket: code and bytes of its reason
_NOW = -1  # as ``after``: with the next key frame
_MEANINGS = {  # of the figures in numbers, for /metrics
    "block": "number of the block that is shown",
    "frame": "number of its first frame",
    "fps": "frames of video shown per second",
    "block_seconds": "seconds that the transformer took for the block",
    "decode_seconds": "seconds that the decoder took for the block",
    "memory_norm": "root mean square of the evolving memory",
    "gate_mean": "share of the old memory that its last update kept",
    "shift": "frames by which position ids lie behind the frames of the video",
    "newest_id": "temporal position id of the newest frame",
    "viewers": "number of viewers now",
    "pictures": "pictures sent out so far",
    "dropped": "pictures that viewers skipped because they were late",
    "gpu_bytes": "bytes in use on the GPU, by all programs",
    "gpu_total_bytes": "bytes of memory of the GPU",
}
_ROOT = "/api/sessions/{name}"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prompt(_Body):
    """``over``: number of blocks that the old prompt turns into this one over."""

    text: str
    over: Annotated[int, Field(ge=1, le=64)] | None = None


class Pause(_Body):
    """Whether the video pauses, for all viewers."""

    paused: bool


class Restart(_Body):
    """What the new video begins with; what is not given stays as it is. ``seed`` may be a text of digits."""

    seed: Annotated[int, Field(ge=0, lt=2**64)]
    prompt: str | None = None
    memory: str | None = None


class Resume(_Body):
    """The name of a snapshot."""

    snapshot: str


class Create(_Body):
    """What a new session begins with."""

    name: str
    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    memory: str | None = None


class Offer(_Body):
    """The description of a WebRTC offer that takes one H.264 video."""

    sdp: str


COMMANDS: tuple[tuple[str, str, str, type[_Body] | None, str], ...] = (
    ("GET", "/prompts", "prompts", None, "The prompts so far, each with the block that begins with it."),
    ("POST", "/prompts", "prompt", Prompt, "Switch to another prompt at the first block that has not begun."),
    ("POST", "/pause", "pause", Pause, "Pause, or go on."),
    ("POST", "/restart", "restart", Restart, "Begin another video; another memory mode loads the model again."),
    ("GET", "/snapshots", "snapshots", None, "The snapshots, newest first."),
    ("POST", "/snapshots", "snapshot", None, "Write a snapshot; of too many, the oldest is removed."),
    ("POST", "/resume", "resume", Resume, "Go on from a snapshot."),
    ("GET", "/recordings", "recordings", None, "The finished recordings, newest first."),
    ("POST", "/recordings", "record", None, "Begin to record what is shown."),
    ("POST", "/recordings/stop", "stop_recording", None, "Finish the recording."),
)


def _endpoint(act: Callable[..., Awaitable[dict[str, Any]]], command: str, body: type[_Body] | None) -> Any:
    async def plain(name: str) -> dict[str, Any]:
        return await act(name, command)

    async def with_body(name: str, body: Any) -> dict[str, Any]:
        return await act(name, command, **body.model_dump())

    with_body.__annotations__["body"] = body
    return with_body if body else plain


def make_app(
    sessions: Mapping[str, Session] | Sessions,
    rules: Rules,
    *,
    most_viewers: int = 64,
    ice_servers: list[dict[str, str]] | None = None,
) -> FastAPI:
    """Make the application; its lifespan starts the sessions and closes them.

    Args:
        sessions: by name; the page and the real-time WebSocket have ``main``, unless asked for ``?session=NAME``.
        rules: what is refused.
        most_viewers: of each session; as many again may listen to its events.
        ice_servers: STUN and TURN servers for WebRTC, as ``RTCIceServer`` has them.
    """
    found = Sessions(sessions) if isinstance(sessions, Mapping) else sessions
    rooms: dict[str, _Room] = {}

    async def room_of(name: str) -> _Room:
        if name not in rooms:
            if (session := await found.find(name)) is None:
                raise HTTPException(404, f"expected the name of a session, found {name[:80]!r}")
            channel = Channel(session, most_viewers)
            rooms.setdefault(name, _Room(session, channel, Peers(channel, ice_servers or []), Realtime(session)))
        return rooms[name]

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await found.start()
        yield
        for room in rooms.values():
            room.channel.close()
        await asyncio.gather(*(room.peers.close() for room in rooms.values()))
        await found.close()

    app = FastAPI(title="echo-rt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, rules=rules)
    app.mount("/page", StaticFiles(directory=PAGE))
    for path, file in (("/", "index.html"), ("/docs", "docs.html")):
        app.get(path, include_in_schema=False)(lambda file=file: FileResponse(PAGE / file))

    async def ask(name: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        return await (await room_of(name)).session.ask(command, **arguments)

    for method, path, command, body, about in COMMANDS:
        app.add_api_route(
            f"{_ROOT}{path}",
            _endpoint(ask, command, body),
            methods=[method],
            summary=about,
            operation_id=command,
            tags=["session"],
        )

    @app.exception_handler(EchoError)
    async def wrong(request: Request, error: EchoError) -> JSONResponse:
        status = 429 if isinstance(error, BusyError) else 422 if error.exit_code == 2 else 500
        return JSONResponse({"detail": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the value that was sent; names of fields may be long, too, or not even text.
        found = "; ".join(f"{'.'.join(map(str, one['loc'])):.80}: {one['msg']}" for one in error.errors()[:5])
        return JSONResponse({"detail": printable(found)}, 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI's 400 is for a body that is no JSON, which is as wrong as JSON that does not fit.
        return JSONResponse({"detail": error.detail}, 422 if error.status_code == 400 else error.status_code)

    @app.get(f"{_ROOT}/recordings/{{file}}", tags=["session"], summary="Download a recording, an MP4.")
    async def recording(name: str, file: str) -> FileResponse:
        path = (await ask(name, "recording", file=file))["path"]
        if "://" in path:
            path = await asyncio.to_thread(fsspec.open_local, f"simplecache::{path}")
        return FileResponse(path, media_type="video/mp4", filename=file)

    @app.get("/api/sessions", tags=["sessions"], summary="All sessions with their figures.")
    async def list_sessions() -> list[dict[str, Any]]:
        names = await found.names()
        if found.always:
            return [await session(name) for name in names]
        states = await asyncio.gather(*map(figures, names))  # which wakes none
        return [{"name": name, "figures": state} for name, state in zip(names, states, strict=True)]

    @app.post("/api/sessions", tags=["sessions"], summary="Make another session; needs a cluster.")
    async def create(body: Create) -> dict[str, str]:
        await found.create(**body.model_dump())
        return {"name": body.name}

    @app.post(f"{_ROOT}/park", tags=["sessions"], summary="Store a session and free its machine; needs a cluster.")
    async def park(name: str) -> dict[str, str]:
        if found.always:
            raise ConfigError("this server's session is not parked: end the server, and start it with --resume")
        await (await room_of(name)).session.close()
        return {"state": "parked"}

    @app.get(_ROOT, tags=["sessions"], summary="What a session is, and its figures.")
    async def session(name: str) -> dict[str, Any]:
        described = await soon((await room_of(name)).session.describe())
        about = {key: value for key, value in described.items() if key != "header"}
        return {"name": name, **about, "ice_servers": ice_servers or [], "figures": await figures(name)}

    @app.get(f"{_ROOT}/figures", tags=["sessions"], summary="The state, figures of the newest block, the viewers.")
    async def figures(name: str) -> dict[str, Any]:
        room = await room_of(name)
        return await room.session.ask("figures", audience=room.channel.audience)

    # ---------------------------------------------------------------- health

    @app.get("/healthz", tags=["health"], summary="Whether the server answers; needs no token.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="Whether every video is shown, or paused; needs no token.")
    async def readyz() -> JSONResponse:
        states = {name: (await figures(name))["state"] for name in await found.names()}
        return JSONResponse(states, 503 if {"starting", "failed"} & set(states.values()) else 200)

    @app.get("/metrics", tags=["health"], summary="Figures of all sessions, for Prometheus.")
    async def metrics() -> PlainTextResponse:
        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for one in await list_sessions():
            name, state = one["name"], one["figures"]["state"]
            for key, value in [*one["figures"].items(), (f"is_{state}", 1)]:
                if isinstance(value, int | float):
                    if key not in gauges:
                        meaning = _MEANINGS.get(key, f"1 while the video is {state}")
                        gauges[key] = Gauge(f"echo_rt_live_{key}", meaning, ["session"], registry=registry)
                    gauges[key].labels(name).set(value)
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # ---------------------------------------------------------------- viewers

    @app.post(f"{_ROOT}/offer", tags=["viewers"], summary="Answer a WebRTC offer.")
    async def offer(name: str, body: Offer) -> dict[str, str]:
        return await (await room_of(name)).peers.answer(body.sdp)

    @app.websocket(f"{_ROOT}/video")
    async def video(
        socket: WebSocket, name: str, format: Literal["mp4", "h264"] = "mp4", after: int | None = None
    ) -> None:
        """Send codec and epoch as JSON, for ``mp4`` the header, and then a binary message for each picture.

        With ``after``, -1 at first, each of those begins with its place, 64 bits. Given as ``after`` when connecting
        again, pictures go on there.
        """
        room = await room_of(name)

        async def first() -> list[Any]:
            about = await room.session.describe()
            said = {key: about[key] for key in ("codec", "epoch", "fps", "size")}
            return [said, about["header"]] if format == "mp4" else [said]

        await _feed(socket, room.channel, format, first, after)

    @app.websocket(f"{_ROOT}/events")
    async def events(socket: WebSocket, name: str) -> None:
        """Send every event as JSON; answer ``{"ping": x}`` with ``{"pong": x, "now": seconds}``."""

        async def first() -> list[Any]:
            return [{"type": "hello", **await figures(name)}]

        await _feed(socket, (await room_of(name)).channel, "events", first)

    @app.get("/v1/models", tags=["realtime"], summary="The served model, as OpenAI's API lists it.")
    async def models(session: str = "main") -> dict[str, Any]:
        return await (await room_of(session)).realtime.models()

    @app.websocket("/v1/realtime_video/generate")
    async def generate(socket: WebSocket, session: str = "main") -> None:
        await (await room_of(session)).realtime.generate(socket)

    return app


@dataclass(frozen=True)
class _Room:
    """A session and those who are in it."""

    session: Session
    channel: Channel
    peers: Peers
    realtime: Realtime


async def _feed(
    socket: WebSocket,
    channel: Channel,
    kind: Kind,
    first: Callable[[], Awaitable[list[Any]]],
    after: int | None = None,
) -> None:
    """Send ``first`` and then what the viewer's queue has, until either side ends or the viewer takes nothing."""
    await socket.accept()
    with contextlib.ExitStack() as stack:
        try:
            viewer = stack.enter_context(channel.view(kind, None if after == _NOW else after))
        except BusyError as error:
            await socket.close(_TRY_LATER, str(error)[:_MOST_REASON])
            return
        numbered = after is not None
        tasks = [asyncio.create_task(_answer(socket)), asyncio.create_task(_push(socket, viewer, first, numbered))]
        try:
            await channel.session.ask("keyframe")
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError):  # it has left, or takes nothing
        await asyncio.wait_for(socket.close(), 1)


async def _answer(socket: WebSocket) -> None:
    while True:
        message = await socket.receive_json()
        if isinstance(message, dict) and isinstance(message.get("ping"), int | float):
            await send(socket, {"pong": message["ping"], "now": time.time()})


async def _push(socket: WebSocket, viewer: Viewer, first: Callable[[], Awaitable[list[Any]]], numbered: bool) -> None:
    for entry in await first():
        await send(socket, entry)
    while True:
        entry = await viewer.get()
        entry = entry[1] if isinstance(entry, tuple) else entry
        await send(socket, viewer.place.to_bytes(8, "big") + entry if numbered else entry)
