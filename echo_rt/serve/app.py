"""The HTTP and WebSocket API of live sessions, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from echo_rt.errors import EchoError
from echo_rt.serve.guard import Guard, Rules
from echo_rt.serve.realtime import Realtime
from echo_rt.serve.rtc import Peers
from echo_rt.serve.session import BusyError, Session
from echo_rt.serve.viewers import Channel, Viewer
from echo_rt.utils.build_info import __version__

PAGE = Path(__file__).parent / "page"
_SILENT_SECONDS = 15.0  # a viewer whose connection takes nothing for so long is closed
_TRY_LATER = 1013  # of a WebSocket
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
    sessions: Mapping[str, Session],
    rules: Rules,
    *,
    most_viewers: int = 64,
    ice_servers: list[dict[str, str]] | None = None,
) -> FastAPI:
    """Make the application; its lifespan starts the sessions and closes them.

    Args:
        sessions: by name; the page and the real-time WebSocket have ``main``.
        rules: what is refused.
        most_viewers: of each session; as many again may listen to its events.
        ice_servers: STUN and TURN servers for WebRTC, as ``RTCIceServer`` has them.
    """
    channels = {name: Channel(session, most_viewers) for name, session in sessions.items()}
    peers = {name: Peers(channel, ice_servers or []) for name, channel in channels.items()}

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        for session in sessions.values():
            await session.start()
        pumps = [asyncio.create_task(channel.run()) for channel in channels.values()]
        yield
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*(one.close() for one in peers.values()))
        await asyncio.gather(*(session.close() for session in sessions.values()))

    app = FastAPI(title="echo-rt", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, rules=rules)
    app.mount("/page", StaticFiles(directory=PAGE))
    for path, file in (("/", "index.html"), ("/docs", "docs.html")):
        app.get(path, include_in_schema=False)(lambda file=file: FileResponse(PAGE / file))

    def channel_of(name: str) -> Channel:
        if name not in channels:
            raise HTTPException(404, f"expected the name of a session, found {name[:80]!r}")
        return channels[name]

    async def ask(name: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        return await channel_of(name).session.ask(command, **arguments)

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
        # Without the value that was sent, which may be long, or not even text.
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        return JSONResponse({"detail": found.encode(errors="replace").decode()}, 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI's 400 is for a body that is no JSON, which is as wrong as JSON that does not fit.
        return JSONResponse({"detail": error.detail}, 422 if error.status_code == 400 else error.status_code)

    @app.get(f"{_ROOT}/recordings/{{file}}", tags=["session"], summary="Download a recording, an MP4.")
    async def recording(name: str, file: str) -> FileResponse:
        return FileResponse((await ask(name, "recording", file=file))["path"], media_type="video/mp4", filename=file)

    @app.get("/api/sessions", tags=["sessions"], summary="All sessions with their figures.")
    async def list_sessions() -> list[dict[str, Any]]:
        return [await session(name) for name in sessions]

    @app.get(_ROOT, tags=["sessions"], summary="What a session is, and its figures.")
    async def session(name: str) -> dict[str, Any]:
        about = {key: value for key, value in (await channel_of(name).session.describe()).items() if key != "header"}
        return {"name": name, **about, "ice_servers": ice_servers or [], "figures": await figures(name)}

    @app.get(f"{_ROOT}/figures", tags=["sessions"], summary="The state, figures of the newest block, the viewers.")
    async def figures(name: str) -> dict[str, Any]:
        return {**await ask(name, "figures"), **channel_of(name).figures()}

    # ---------------------------------------------------------------- health

    @app.get("/healthz", tags=["health"], summary="Whether the server answers; needs no token.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="Whether every video is shown, or paused; needs no token.")
    async def readyz() -> JSONResponse:
        states = {name: (await session.ask("figures"))["state"] for name, session in sessions.items()}
        return JSONResponse(states, 200 if set(states.values()) <= {"playing", "paused"} else 503)

    @app.get("/metrics", tags=["health"], summary="Figures of all sessions, for Prometheus.")
    async def metrics() -> PlainTextResponse:
        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for name in sessions:
            for key, value in (await figures(name)).items():
                if isinstance(value, int | float):
                    if key not in gauges:
                        gauges[key] = Gauge(
                            f"echo_rt_live_{key}", key.replace("_", " "), ["session"], registry=registry
                        )
                    gauges[key].labels(name).set(value)
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # ---------------------------------------------------------------- viewers

    @app.post(f"{_ROOT}/offer", tags=["viewers"], summary="Answer a WebRTC offer.")
    async def offer(name: str, body: Offer) -> dict[str, str]:
        channel_of(name)
        return await peers[name].answer(body.sdp)

    @app.websocket(f"{_ROOT}/video")
    async def video(socket: WebSocket, name: str, format: Literal["mp4", "h264"] = "mp4") -> None:
        """Send codec and epoch as JSON, for ``mp4`` the header, and then a binary message for each picture."""
        about = await channel_of(name).session.describe()
        first = [{key: about[key] for key in ("codec", "epoch", "fps", "size")}]
        await _feed(socket, channel_of(name), format, [*first, about["header"]] if format == "mp4" else first)

    @app.websocket(f"{_ROOT}/events")
    async def events(socket: WebSocket, name: str) -> None:
        """Send every event as JSON; answer ``{"ping": x}`` with ``{"pong": x, "now": seconds}``."""
        await _feed(socket, channel_of(name), "events", [{"type": "hello", **await figures(name)}])

    realtime = Realtime(channels["main"].session)
    app.get("/v1/models", tags=["realtime"], summary="The served model, as OpenAI's API lists it.")(realtime.models)
    app.websocket("/v1/realtime_video/generate")(realtime.generate)
    return app


async def _feed(socket: WebSocket, channel: Channel, kind: Any, first: list[Any]) -> None:
    """Send ``first`` and then what the viewer's queue has, until either side ends or the viewer takes nothing."""
    await socket.accept()
    with contextlib.ExitStack() as stack:
        try:
            viewer = stack.enter_context(channel.view(kind))
        except BusyError as error:
            await socket.close(_TRY_LATER, str(error))
            return
        tasks = [asyncio.create_task(_answer(socket)), asyncio.create_task(_push(socket, viewer, first))]
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
            await _send(socket, {"pong": message["ping"], "now": time.time()})


async def _push(socket: WebSocket, viewer: Viewer, first: list[Any]) -> None:
    for entry in first:
        await _send(socket, entry)
    while True:
        entry = await viewer.get()
        await _send(socket, entry[1] if isinstance(entry, tuple) else entry)


async def _send(socket: WebSocket, entry: Any) -> None:
    sent = socket.send_bytes(entry) if isinstance(entry, bytes) else socket.send_json(entry)
    await asyncio.wait_for(sent, _SILENT_SECONDS)
