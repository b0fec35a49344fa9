"""A thread that makes blocks ahead of their consumers."""

from __future__ import annotations

import atexit
import math
import threading
import traceback
from collections.abc import Callable
from typing import ClassVar

from echo_rt.chunk import Chunk
from echo_rt.engine.ready import DropOldest, ReadyQueue
from echo_rt.errors import StreamError
from echo_rt.utils.process import ProcessGuard


class Feeder(threading.Thread):
    """Keeps ``depth`` blocks in ``ready``: it waits while there are so many, or goes on and drops the oldest.

    ``make_ahead`` makes a block unless so many are ready, and is False once there are no more. ``stopped``: nothing
    more is wanted; ``over``: nothing more comes. It does not know the feed, so a feed that nobody holds can be freed.
    """

    # They are daemons, so that a forgotten one cannot keep the interpreter from its end; but what torch does in a
    # thread must be over before the interpreter is torn down.
    running: ClassVar[set[Feeder]] = set()

    def __init__(self, ready: ReadyQueue, make_ahead: Callable[[float], bool], depth: int, drop: bool) -> None:
        super().__init__(name="echo_rt feed", daemon=True)
        self.policy = DropOldest(depth)
        self.stopped = self.over = False
        self._ready, self._make_ahead = ready, make_ahead
        self._depth = math.inf if drop else depth
        self._error: BaseException | None = None
        self._process = ProcessGuard()
        ready.attach(self)
        if drop:
            ready.policy = self.policy
        Feeder.running.add(self)
        self.start()

    def run(self) -> None:
        """Make blocks until nobody wants one more, or there are no more."""
        try:
            while self._wait_for_place() and self._make_ahead(self._depth):
                pass
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # some hold this object, which is to hold the error
            self._error = error
        finally:
            self.over = True
            self._ready.notify()
            Feeder.running.discard(self)
            del self  # this frame is one of them

    def _wait_for_place(self) -> bool:
        """Wait until one more block may be made; False when none is wanted any more."""
        ready = self._ready
        with ready.lock:
            ready.changed.wait_for(lambda: self.stopped or ready.closed or len(ready) < self._depth)
            return not self.stopped

    def stop(self) -> None:
        """Make no block after the one under way. It may come in any thread, amid anything, so it waits for nothing."""
        if self._process.left:
            return  # a lock may be held by a thread that only the parent has
        with self._ready.lock:
            self.stopped = True
            if self._ready.policy is self.policy:
                self._ready.policy = None
            self._ready.detach(self)

    def has_news(self) -> bool:
        """Whether :meth:`take` has a block, an error or the end."""
        return self.stopped or self.over or len(self._ready) > 0

    def take(self) -> Chunk | None:
        """Once :meth:`has_news`: the oldest block; None at the end; raises what ended the thread, once."""
        if self.stopped:
            return None
        if (chunk := self._ready.take()) is not None:
            return chunk
        error, self._error = self._error, None
        try:
            if error is None:
                return None
            if isinstance(error, Exception):
                raise error
            # Raised here, a SystemExit of that thread would end this one.
            raise StreamError(f"the feed's thread died of {type(error).__name__}: {error}") from error
        finally:
            del error  # or this frame and the error would keep each other alive


@atexit.register
def _end_all() -> None:
    for feeder in list(Feeder.running):
        if feeder.is_alive():  # those of a process that this one was forked from are not
            feeder.stop()
            feeder.join()
