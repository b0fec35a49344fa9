"""Viewers of one session: each has a bounded queue, so that a slow or silent one holds up nobody."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from echo_rt.serve.session import BusyError, Item, Picture, Session

Kind = Literal["mp4", "h264", "events"]
_MOST_ITEMS = 48  # three seconds of pictures
_MOST_BYTES = 4 << 20
_AGAIN_SECONDS = 1.0

logger = logging.getLogger("echo_rt.serve")


class Viewer:
    """One viewer's queue. One that is late loses what waits, and pictures up to the next key frame."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.dropped = kind, 0
        self._queue: deque[tuple[int, Any]] = deque()
        self._bytes, self._needs_key = 0, True
        self._filled = asyncio.Event()

    def offer(self, item: Item) -> None:
        """Queue ``item`` if this viewer is for it."""
        if isinstance(item, Picture) == (self.kind == "events"):
            return
        key, size, entry = True, 0, item  # type: bool, int, Any
        if isinstance(item, Picture):
            key, data = (item.mp4_key, item.mp4) if self.kind == "mp4" else (item.key, item.h264)
            size, entry = len(data), data if self.kind == "mp4" else (item.pts, data)
        if len(self._queue) >= _MOST_ITEMS or self._bytes + size > _MOST_BYTES:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._bytes, self._needs_key = 0, True
        if self._needs_key and not key:
            self.dropped += 1
            return
        self._needs_key = False
        self._queue.append((size, entry))
        self._bytes += size
        self._filled.set()

    async def get(self) -> Any:
        """Wait for the next entry: bytes for mp4, ``(pts, bytes)`` for h264, a dict for events."""
        while not self._queue:
            self._filled.clear()
            await self._filled.wait()
        size, entry = self._queue.popleft()
        self._bytes -= size
        return entry


class Channel:
    """A session and its viewers in this process; :meth:`run` hands out what the session makes."""

    def __init__(self, session: Session, most: int) -> None:
        self.session, self._most = session, most
        self._viewers: set[Viewer] = set()
        self._pictures = self._dropped = 0

    async def run(self) -> None:
        """Pull from the session until cancelled; one that does not answer is asked again."""
        after = 0
        while True:
            try:
                items = await self.session.next(after)
            except Exception as error:  # of another process, for example: viewers go on once it is back
                logger.warning("the session does not answer: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            for number, item in items:
                after = number
                self._pictures += isinstance(item, Picture)
                for viewer in self._viewers:
                    viewer.offer(item)

    def figures(self) -> dict[str, Any]:
        """Number of viewers; of pictures so far; of those that viewers were too late for."""
        watching = [viewer for viewer in self._viewers if viewer.kind != "events"]
        dropped = self._dropped + sum(viewer.dropped for viewer in watching)
        return {"viewers": len(watching), "pictures": self._pictures, "dropped": dropped}

    @contextmanager
    def view(self, kind: Kind) -> Iterator[Viewer]:
        """Add a viewer for a while; :class:`BusyError` where there are too many."""
        if sum((viewer.kind == "events") == (kind == "events") for viewer in self._viewers) >= self._most:
            raise BusyError(f"there are {self._most} viewers, the most that this server takes")
        viewer = Viewer(kind)
        self._viewers.add(viewer)
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            self._dropped += viewer.dropped * (kind != "events")
