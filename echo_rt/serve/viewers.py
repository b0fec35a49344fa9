"""Viewers of one session: each has a bounded queue, so that a slow or silent one holds up nobody."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from starlette.websockets import WebSocket

from echo_rt.serve.session import KEPT, Audience, BusyError, Item, ParkedError, Picture, Session

Kind = Literal["mp4", "h264", "events"]
_MOST_ITEMS = 48  # three seconds of pictures
_MOST_BYTES = 4 << 20
_AGAIN_SECONDS = 1.0
_SILENT_SECONDS = 15.0  # a viewer whose connection takes nothing for so long is closed
_NEVER = 1 << 63  # a place

logger = logging.getLogger("echo_rt.serve")


async def send(socket: WebSocket, entry: Any) -> None:
    """Send bytes as they are, or JSON; ``asyncio.TimeoutError`` if the other side takes nothing for too long."""
    sent = socket.send_bytes(entry) if isinstance(entry, bytes) else socket.send_json(entry)
    await asyncio.wait_for(sent, _SILENT_SECONDS)


class Viewer:
    """One viewer's queue. One that is late loses what waits, and pictures up to the next key frame.

    ``missed``: the items after the last that it has, for one that was here before. ``place``: that of the last entry.
    """

    def __init__(self, kind: Kind, missed: Iterable[tuple[int, Item]] | None = None) -> None:
        self.kind, self.dropped, self.place = kind, 0, 0
        self._queue: deque[tuple[int, int, Any]] = deque()
        self._bytes, self._needs_key = 0, missed is None
        self._room = 1 if missed is None else 1 + KEPT // _MOST_ITEMS  # who was away has more to catch up with
        self._filled = asyncio.Event()
        for place, item in missed or ():
            self.offer(place, item)

    def offer(self, place: int, item: Item) -> None:
        """Queue ``item`` if this viewer is for it."""
        if isinstance(item, Picture) == (self.kind == "events"):
            return
        key, size, entry = True, 0, item  # type: bool, int, Any
        if isinstance(item, Picture):
            key, data = (item.mp4_key, item.mp4) if self.kind == "mp4" else (item.key, item.h264)
            size, entry = len(data), data if self.kind == "mp4" else (item.pts, data)
        if len(self._queue) >= self._room * _MOST_ITEMS or self._bytes + size > self._room * _MOST_BYTES:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._bytes, self._needs_key = 0, True
        if self._needs_key and not key:
            self.dropped += 1
            return
        self._needs_key = False
        self._queue.append((place, size, entry))
        self._bytes += size
        self._filled.set()

    async def get(self) -> Any:
        """Wait for the next entry: bytes for mp4, ``(pts, bytes)`` for h264, a dict for events."""
        while not self._queue:
            self._filled.clear()
            await self._filled.wait()
        self.place, size, entry = self._queue.popleft()
        self._bytes -= size
        return entry


class Channel:
    """A session and its viewers in this process, who have what it makes while there are any.

    A session that is parked stays so until somebody else comes, or it is back: its viewers are told, and wait.
    """

    def __init__(self, session: Session, most: int) -> None:
        self.session, self._most, self._name = session, most, secrets.token_hex(8)
        self._viewers: set[Viewer] = set()
        self._kept: deque[tuple[int, Item]] = deque(maxlen=KEPT)
        self._whole_after = 0  # all that came after this place is kept
        self._pull: asyncio.Task[None] | None = None
        self._wanted = False  # somebody has come since the last items
        self._dropped = 0

    def close(self) -> None:
        """Ask the session no more."""
        if self._pull is not None:
            self._pull.cancel()
        self._pull = None
        self._kept.clear()

    async def _run(self, after: int | None) -> None:
        """Pull from the session until cancelled; one that does not answer is asked again."""
        parked = False
        while True:
            try:
                if parked:
                    await self._until_wanted()
                items = await self.session.next(after, self.audience)
            except ParkedError:
                for viewer in () if parked else self._viewers:
                    viewer.offer(after or 0, {"type": "parked"})
                parked = True
                continue
            except Exception as error:  # of another process, for example: viewers go on once it is back
                logger.warning("the session does not answer: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            parked = self._wanted = False
            for after, item in items:
                if len(self._kept) == KEPT:
                    self._whole_after = self._kept[0][0]
                self._whole_after = min(self._whole_after, after)
                self._kept.append((after, item))
                for viewer in self._viewers:
                    viewer.offer(after, item)

    async def _until_wanted(self) -> None:
        """Wait until somebody has come here, or the session is back for others.

        One that is about to be parked "waits" too, and asking it for pictures would bring it back.
        """
        state = "parked"
        while state in ("parked", "waiting"):
            await asyncio.sleep(_AGAIN_SECONDS)
            state = "wanted" if self._wanted else (await self.session.ask("figures"))["state"]

    @property
    def audience(self) -> Audience:
        """Those who watch, without those who listen to events."""
        watching = [viewer for viewer in self._viewers if viewer.kind != "events"]
        dropped = self._dropped + sum(viewer.dropped for viewer in watching)
        return Audience(self._name, len(watching), dropped)

    @contextmanager
    def view(self, kind: Kind, after: int | None = None) -> Iterator[Viewer]:
        """Add a viewer for a while, who may have come as far as ``after``; :class:`BusyError` for too many."""
        if sum((viewer.kind == "events") == (kind == "events") for viewer in self._viewers) >= self._most:
            raise BusyError(f"there are {self._most} viewers, the most that this server takes")
        self._wanted = True
        if self._pull is None:
            self._whole_after = _NEVER if after is None else after
            self._pull = asyncio.create_task(self._run(after))
        whole = after is not None and after >= self._whole_after
        viewer = Viewer(kind, [entry for entry in self._kept if entry[0] > (after or 0)] if whole else None)
        self._viewers.add(viewer)
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            self._dropped += viewer.dropped * (kind != "events")
            if not self._viewers:
                self.close()
