"""What the server knows of a live video: plain values and a few calls, so that it may run in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from echo_rt.errors import EchoError

CLOCK = 90_000  # ticks a second of ``Picture.pts``, as in RTP


class BusyError(EchoError):
    """More is asked at once than the session takes; ask again later."""

    exit_code = 1


@dataclass(frozen=True)
class Picture:
    """One encoded picture.

    ``pts``: ticks since the session's epoch. ``h264``: an access unit with start codes; those after a ``key`` need none
    before it. ``mp4``: a fragment with the picture before this one; ``mp4_key``: whether a player may begin with it.
    """

    pts: int
    key: bool
    h264: bytes = field(repr=False)
    mp4: bytes = field(repr=False)
    mp4_key: bool


@dataclass(frozen=True)
class Block:
    """The frames of the block that is being shown: ``frames`` RGB24 pictures in ``data``, made in ``seconds``."""

    index: int
    frames: int
    data: bytes = field(repr=False)
    seconds: float


Item = Picture | dict[str, Any]  # a picture, or an event in plain JSON types with its ``type``


class Session(Protocol):
    """A live video; what a client got wrong is an :class:`EchoError`."""

    async def start(self) -> None:
        """Begin to show; called once, in the event loop that makes the other calls."""

    async def describe(self) -> dict[str, Any]:
        """Return what does not change: size, fps, codec, MP4 ``header``, ``epoch`` (of :func:`time.time`), controls."""

    async def next(self, after: int) -> list[tuple[int, Item]]:
        """Return the items numbered above ``after``; waits up to a second for one. Only the last few are kept."""

    async def block(self, after: int) -> Block | None:
        """Return the block being shown as soon as its number is not ``after``; None after a second."""

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Carry out a command of :data:`echo_rt.serve.app.COMMANDS`, ``keyframe`` or ``figures``."""

    async def close(self) -> None:
        """End the video: close the recording, write a snapshot."""
