"""A real-time WebSocket in the manner of SGLang's ``/v1/realtime_video/generate``: MessagePack, raw RGB.

The client begins with an ``init`` message, which restarts the session's video. Each block that is shown comes as a
``frame_batch_header``, a binary message with its frames, and ``chunk_stats``. ``event`` messages of kind ``prompt``
change the prompt. One client at a time; one that is late skips blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TypeVar

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from echo_rt.errors import ConfigError, EchoError
from echo_rt.serve.session import BusyError, Session
from echo_rt.serve.viewers import send
from echo_rt.utils.wording import first_line

_INIT_SECONDS = 10.0
_Message = TypeVar("_Message")


class _Init(msgspec.Struct, tag_field="type", tag="init"):
    """The first message; SGLang's other fields are ignored."""

    prompt: str
    seed: int = 0
    size: str | None = None
    max_chunks: int | None = None
    realtime_output_format: str = "raw"


class _Event(msgspec.Struct, tag_field="type", tag="event"):
    kind: str
    payload: str | dict[str, Any] = ""
    event_id: int | None = None


class Realtime:
    """The endpoint, on one session."""

    def __init__(self, session: Session) -> None:
        self._session, self._taken = session, asyncio.Lock()

    async def models(self) -> dict[str, Any]:
        """List the served model."""
        model = (await self._session.describe())["model"]
        return {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "echo-rt"}]}

    async def generate(self, socket: WebSocket) -> None:
        """Serve one client to its end."""
        await socket.accept()
        try:
            if self._taken.locked():
                raise BusyError("another client has the session; try again later")
            async with self._taken:
                await self._generate(socket)
        except EchoError as error:
            await _send(socket, {"type": "error", "content": str(error)})
        except (WebSocketDisconnect, asyncio.TimeoutError):
            return  # it has left, or is silent
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.close()

    async def _generate(self, socket: WebSocket) -> None:
        init = await asyncio.wait_for(_receive(socket, _Init), _INIT_SECONDS)
        about = await self._session.describe()
        width, height = about["size"]
        for name, expected in (("size", f"{width}x{height}"), ("realtime_output_format", "raw")):
            if (found := getattr(init, name)) not in (None, expected):
                raise ConfigError(f"{name}: expected {expected}, which this server makes, found {found[:40]!r}")
        await self._session.ask("restart", seed=init.seed, prompt=init.prompt)
        listener = asyncio.create_task(self._listen(socket))
        pixels = {"width": width, "height": height, "channels": 3, "bytes_per_frame": width * height * 3}
        header = {"type": "frame_batch_header", "content_type": "application/x-raw-rgb", **pixels}
        try:
            after, sent = 0, 0
            while (init.max_chunks is None or sent < init.max_chunks) and not listener.done():
                if (block := await self._session.block(after)) is None:
                    continue
                after, sent = block.place, sent + 1
                chunk = {"chunk_index": block.index, "num_frames": block.frames}
                await _send(socket, {**header, **chunk, "is_final_frame_batch": True})
                await send(socket, block.data)
                times = {"scheduler_forward_ms": round(block.seconds * 1000), "ws_payload_bytes": len(block.data)}
                await _send(socket, {"type": "chunk_stats", **chunk, **times})
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self, socket: WebSocket) -> None:
        """Take events; one that cannot be taken is told, and the video goes on."""
        while True:
            try:
                event = await _receive(socket, _Event)
                text = event.payload if isinstance(event.payload, str) else event.payload.get("prompt", "")
                if event.kind != "prompt":
                    raise ConfigError(f"kind: expected prompt, found {event.kind[:40]!r}")
                taken = await self._session.ask("prompt", text=str(text))
                await _send(socket, {"type": "event_ack", "event_id": event.event_id, "chunk_index": taken["block"]})
            except EchoError as error:
                await _send(socket, {"type": "error", "content": str(error)})


async def _receive(socket: WebSocket, kind: type[_Message]) -> _Message:
    try:
        return msgspec.msgpack.decode(await socket.receive_bytes(), type=kind)
    except KeyError:  # Starlette's
        raise ConfigError("expected MessagePack in a binary message, found a text") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ConfigError(first_line(error)) from None


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    await send(socket, msgspec.msgpack.encode(message))
