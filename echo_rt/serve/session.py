"""What the server knows of a live video: plain values and a few calls, so that it may run in another process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from echo_rt.errors import ConfigError, EchoError, PromptError

MOST_PROMPT = 2000  # characters
CLOCK = 90_000  # ticks a second of ``Picture.pts``, as in RTP
# The number of a picture, from 1, times this is its place. Events after it, and pictures that show it again, have the
# places that follow. A session that comes back after the death of its process goes on with the places.
PLACES = 1 << 20
KEPT = 256  # pictures and events, for a reader that is late

_SOON_SECONDS = 20.0

T = TypeVar("T")


class BusyError(EchoError):
    """More is asked at once than the session takes; ask again later."""

    exit_code = 1


class ParkedError(BusyError):
    """The session was stored meanwhile, to make room for others; the next call brings it back."""


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
    """The frames of the block that is being shown: ``frames`` RGB24 pictures in ``data``, made in ``seconds``.

    ``place``: that of its last picture.
    """

    index: int
    frames: int
    data: bytes = field(repr=False)
    seconds: float
    place: int


@dataclass(frozen=True)
class Audience:
    """The viewers of a session in one gateway, which has a name; ``dropped``: pictures that they were too late for."""

    gateway: str
    viewers: int
    dropped: int


Item = Picture | dict[str, Any]  # a picture, or an event in plain JSON types with its ``type``


class Session(Protocol):
    """A live video; what a client got wrong is an :class:`EchoError`."""

    async def start(self) -> None:
        """Begin to show; called once, in the event loop that makes the other calls."""

    async def describe(self) -> dict[str, Any]:
        """Return what does not change: size, fps, codec, MP4 ``header``, ``epoch`` (of :func:`time.time`), controls."""

    async def next(self, after: int | None, audience: Audience | None = None) -> list[tuple[int, Item]]:
        """Return the items whose places are above ``after``, or that come from now on; waits up to a second for one.

        Only the last :data:`KEPT` are there. ``audience``: for whom. Raises :class:`ParkedError` if the session was
        parked meanwhile; a later call brings it back.
        """

    async def block(self, after: int) -> Block | None:
        """Return the block being shown as soon as its place is above ``after``; None after a second. As ``next``."""

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Carry out a command of :data:`echo_rt.serve.app.COMMANDS`, ``keyframe`` or ``figures``.

        The last two bring back no session that is parked; ``audience`` says who asks for figures.
        """

    async def close(self) -> None:
        """End the video: close the recording, write a snapshot."""


class Sessions:
    """The sessions of this process, by name, from the start of the server to its end."""

    always = True  # they are pulled from even while nobody watches

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        self._sessions = sessions

    async def start(self) -> None:
        """Begin to show all."""
        for session in self._sessions.values():
            await session.start()

    async def close(self) -> None:
        """End all."""
        for session in self._sessions.values():
            await session.close()

    async def find(self, name: str) -> Session | None:
        """Return the session of that name, if there is one."""
        return self._sessions.get(name)

    async def names(self) -> list[str]:
        """Return all names."""
        return list(self._sessions)

    async def create(self, name: str, prompt: str, seed: int, memory: str | None) -> None:
        """Make another session."""
        raise ConfigError("this server has one session; more need a cluster: echo-rt serve --ray")


async def soon(call: Awaitable[T]) -> T:
    """Wait for a session's answer, but not for as long as it may take to have a machine and a model."""
    try:
        return await asyncio.wait_for(call, _SOON_SECONDS)
    except asyncio.TimeoutError:
        raise BusyError("the session waits for a free machine, or loads its model; ask again later") from None


def checked_prompt(text: str) -> str:
    """Return a prompt without blanks around it; :class:`PromptError` for one that is empty, too long or not text."""
    text = text.strip()
    if not 1 <= len(text) <= MOST_PROMPT:
        raise PromptError(f"expected a prompt of 1 to {MOST_PROMPT} characters, found {len(text)} without blanks")
    if not all(character.isprintable() or character in "\n\t" for character in text):
        raise PromptError("expected a prompt of printable characters, found others")
    return text
