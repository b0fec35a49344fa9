"""What viewers are shown of one video, and when: pictures and events, each at its place, and who waits for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from echo_rt.errors import OutputError
from echo_rt.serve.encoder import LiveEncoder, Recording
from echo_rt.serve.session import KEPT, PLACES, Audience, Item, Picture

_RECORDED_SECONDS = 3600
_NEWS_SECONDS = 1.0
_KEY_SECONDS = 0.25  # between two key frames that viewers asked for
_STILL_SECONDS = 0.5  # between two pictures of a video that pauses
_LEASE_SECONDS = 2.0  # who has not asked for so long no longer watches
_MEET_SECONDS = 0.25  # in which all who watched before say how far they are

T = TypeVar("T")


class Screen:
    """Encodes pictures once for all viewers, and keeps the last :data:`KEPT` pictures and events for who is late.

    One thread shows. It holds still while ``paused`` and, if ``leased``, while nobody watches; it begins no block while
    ``held``; ``leave`` ends its waits. Pictures' times count from ``epoch``. ``shown``: number of pictures that a
    process before this one has shown, and its viewers may have or not.

    ``changed`` guards what the threads share, and is notified of every change. ``place``: that of the newest item;
    ``went_on``: the time at which the video last went on after holding still; ``key_wanted``: makes one of the next
    pictures a key frame; ``seen``: number of the last picture that all viewers have from a process before.
    """

    def __init__(
        self, size: tuple[int, int], fps: int, megabits: float, *, leased: bool, shown: int, epoch: float
    ) -> None:
        self.changed = threading.Condition()
        self._news: Future[None] = Future()  # of the next item, for event loops
        self._started = time.monotonic() - (time.time() - epoch)
        self.encoder = LiveEncoder(size, fps, megabits)
        self.paused = self.leave = self.held = False
        self.place, self.went_on = shown * PLACES, 0.0
        self.recording: Recording | None = None
        self._fps, self._leased, self._pictures = fps, leased, 0
        self._items: deque[tuple[int, Item]] = deque(maxlen=KEPT)
        self._asked_at = 0.0
        self._audiences: dict[str, tuple[float, Audience]] = {}
        self._heard: list[int] | None = [] if leased else None  # places of the last pictures that viewers have
        self.seen = self._seen_by_some = shown  # the latter: by some viewers
        self.key_wanted, self._key_at = True, 0.0

    # ---------------------------------------------------------------- who waits

    async def next(self, after: int | None, audience: Audience | None = None) -> list[tuple[int, Item]]:
        """Return the items above ``after``, or from now on; waits up to a second for one."""
        begin = self.place

        def found() -> list[tuple[int, Item]]:
            # A place that nobody can have seen yet is that of another video.
            most = (max(self.place // PLACES, self._seen_by_some) + 1) * PLACES
            above = begin if after is None or after >= most else after
            return [item for item in self._items if item[0] > above]

        return await self.watch(after, found, audience)

    async def watch(self, after: int | None, get: Callable[[], T], audience: Audience | None = None) -> T:
        """Return what ``get`` finds, as soon as it is something, or after a second, for one who has seen ``after``."""
        with self.changed:
            self._asked_at = time.monotonic()
            if audience is not None:
                self._audiences[audience.gateway] = self._asked_at, audience
            if after and self._heard is not None:
                self._heard.append(after)
            self.changed.notify_all()
            news, found = self._news, get()
        if not found:
            await asyncio.wait([asyncio.wrap_future(news)], timeout=_NEWS_SECONDS)
            with self.changed:
                found = get()
                if self._news is news:  # nothing came; for hours of that, what waits for it would pile up
                    self._wake()
        return found

    def _wake(self) -> None:
        news, self._news = self._news, Future()
        news.set_result(None)

    @property
    def unwatched(self) -> bool:
        """Whether the video holds still as nobody watches or records it."""
        return self._leased and self.recording is None and time.monotonic() - self._asked_at > _LEASE_SECONDS

    def figures(self, audience: Audience | None) -> dict[str, Any]:
        """Numbers of viewers, of pictures, of those that viewers were too late for; of all gateways, ``audience`` too.

        A gateway that no longer asks has no viewers.
        """
        now = time.monotonic()
        with self.changed:
            told = {**self._audiences, **({} if audience is None else {audience.gateway: (now, audience)})}
        viewers = sum(one.viewers for at, one in told.values() if now - at < _LEASE_SECONDS)
        dropped = sum(one.dropped for _, one in told.values())
        return {"viewers": viewers, "pictures": self._pictures, "dropped": dropped}

    # ---------------------------------------------------------------- the thread that shows

    def meet(self, first: int, most: int) -> bool:
        """Wait for viewers, and learn which pictures they have from a process before: no more of them is shown.

        Only those from number ``first`` to below ``most`` can be known: others are of viewers who were away for long,
        or of another video. Returns False to leave.
        """
        if self._heard is None:
            return not self.leave
        self.wait_for(lambda: not self.unwatched)
        self.wait_for(lambda: False, _MEET_SECONDS)
        with self.changed:
            if known := [place for place in self._heard if first <= place // PLACES < most]:
                self.place = max(min(known), max(known) - KEPT * PLACES)
                self.seen, self._seen_by_some = self.place // PLACES, max(known) // PLACES
            self._heard = None
        return not self.leave

    def wait_for(self, true: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until it is true, or the thread that shows must leave."""
        with self.changed:
            self.changed.wait_for(lambda: self.leave or true(), seconds)

    def set(self, flag: Literal["paused", "held", "leave"], value: bool) -> None:
        """Set ``paused``, ``held`` or ``leave``."""
        with self.changed:
            setattr(self, flag, value)
            self.changed.notify_all()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Begin to show no block meanwhile: what is shown must not depend on what is not yet stored."""
        self.set("held", True)
        try:
            yield
        finally:
            self.set("held", False)

    def show(self, frame: NDArray[np.uint8], number: int, due: float) -> bool:
        """Show picture ``number`` in its turn, not before ``due`` (of the monotonic clock), and return True.

        False without having shown it: to leave, or as all viewers have it.
        """
        if number <= self.seen:
            if number == self.seen:
                self._encode(frame, key=True)  # its MP4 fragment was not sent
            return False
        self.wait_for(lambda: False, due - time.monotonic())
        with self.changed:
            while (self.paused or self.unwatched) and not self.leave:
                if not self.unwatched:
                    self._append(self._picture(frame, key=False))  # once more, so that who comes now sees it
                self.wait_for(lambda: not (self.paused or self.unwatched), _STILL_SECONDS)
                self.went_on = time.monotonic()
            if self.leave:
                return False
        picture = self._picture(frame, key=number <= self._seen_by_some + 1)  # where some viewer goes on
        self._append(picture, number)
        self._record(picture)
        return True

    def _picture(self, frame: NDArray[np.uint8], *, key: bool) -> Picture:
        now = time.monotonic()
        if self.key_wanted and now - self._key_at >= _KEY_SECONDS:
            self.key_wanted, self._key_at, key = False, now, True
        return self._encode(frame, key=key)

    def _encode(self, frame: NDArray[np.uint8], *, key: bool) -> Picture:
        return self.encoder.encode(frame, time.monotonic() - self._started, key=key)

    def _record(self, picture: Picture) -> None:
        with self.changed:
            recording, problem = self.recording, None
            if recording is None:
                return
            try:
                recording.write(picture)
                if recording.frames < _RECORDED_SECONDS * self._fps:
                    return
                recording.close()
            except OutputError as error:
                problem = str(error)
            self.recording = None
        self.tell({"type": "recorded", "name": recording.path.name, "error": problem})

    # ---------------------------------------------------------------- any thread

    def tell(self, event: dict[str, Any]) -> dict[str, Any]:
        """Send all viewers an event; returns it."""
        self._append(event)
        return event

    def _append(self, item: Item, number: int | None = None) -> None:
        with self.changed:
            self.place = self.place + 1 if number is None else number * PLACES
            self._pictures += isinstance(item, Picture)
            self._items.append((self.place, item))
            self._wake()
