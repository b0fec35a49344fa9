"""Finished blocks that wait for a consumer, and a thread that makes them ahead.

A block is in the queue, and nowhere else, until somebody has taken it.
"""

from __future__ import annotations

import atexit
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from echo_rt.chunk import Chunk
from echo_rt.errors import StreamError
from echo_rt.utils.process import ProcessGuard


class ReadyQueue:
    """Finished blocks of one video, oldest first. Any thread may append and take; no call waits for a block.

    Taking is the last step of every wait, so a wait that is cancelled, interrupted or timed out has taken nothing.
    ``end`` is the number of the next block to be finished. Blocks before ``wanted`` are not handed out any more;
    ``skipped`` counts those. A closed queue keeps its blocks for the consumers that are attached.
    """

    def __init__(self, blocks: Iterable[Chunk] = (), end: int = 0) -> None:
        # Reentrant: a signal handler or the garbage collector may end a feed while its own thread is in here.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.end = end
        self.wanted = self.skipped = 0
        self.closed = False
        self._blocks = deque(blocks)
        self._consumers = 0
        self.news: Future[None] = Future()  # of the next change, for event loops

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def next_block(self) -> int:
        """Number of the next block to be taken, ready or not."""
        end = max(self.end, self.wanted)  # read before the blocks: another thread may append or take meanwhile
        try:
            return self._blocks[0].index
        except IndexError:
            return end

    @property
    def blocks(self) -> tuple[Chunk, ...]:
        """The blocks that wait, oldest first."""
        with self.lock:
            return tuple(self._blocks)

    def append(self, chunk: Chunk) -> None:
        """Add a finished block, unless it is not wanted."""
        with self.lock:
            if chunk.index >= self.wanted:
                self._blocks.append(chunk)
            self.end = chunk.index + 1
            self.notify()

    def skip_to(self, block: int) -> None:
        """Drop the blocks before ``block``, those that wait and those still to be finished."""
        with self.lock:
            self.skipped += max(0, block - self.next_block)
            self.wanted = max(block, self.wanted)
            while self._blocks and self._blocks[0].index < block:
                self._blocks.popleft()
            self.notify()

    def take(self) -> Chunk | None:
        """Remove and return the oldest block; None if there is none."""
        with self.lock:
            self.notify()  # those that wait for a free place; they look once this thread has released the lock
            try:
                return self._blocks.popleft()
            except IndexError:  # not checked before: a signal handler may clear the queue in between
                return None

    def notify(self) -> None:
        """Wake every thread and event loop that waits for a change."""
        with self.lock:
            self.changed.notify_all()
            news, self.news = self.news, Future()
            if not news.done():  # by the garbage collector, which may end a feed in the line before
                news.set_result(None)

    def attach(self, consumers: int) -> None:
        """Count consumers more (1) or fewer (-1) for whom a closed queue keeps its blocks."""
        with self.lock:
            self._consumers += consumers
            if self.closed and not self._consumers:
                self.end = self.next_block
                self._blocks.clear()
            self.notify()

    def close(self) -> None:
        """End the queue, and free its blocks unless a consumer is attached. Idempotent."""
        with self.lock:
            self.closed = True
            self.attach(0)


class Feeder(threading.Thread):
    """Keeps up to ``depth`` blocks in ``ready``; then it waits, or with ``drop`` goes on and drops the oldest.

    ``make_ahead(depth)`` makes a block unless ``depth`` are ready; it returns False once there are no more.
    ``stopped``: no more blocks are wanted; ``over``: no more come. It holds no reference to the feed, so that a feed
    that nobody holds can be freed.
    """

    def __init__(self, ready: ReadyQueue, make_ahead: Callable[[float], bool], depth: int, drop: bool) -> None:
        # A daemon, so that a forgotten one cannot block the interpreter's exit, which closes it.
        super().__init__(name="echo_rt feed", daemon=True)
        self.dropped = 0
        self.stopped = self.over = False
        self._ready, self._make_ahead, self._depth, self._drop = ready, make_ahead, depth, drop
        self._ahead = math.inf if drop else depth
        self._error: BaseException | None = None
        self._process = ProcessGuard()
        ready.attach(1)
        atexit.register(self.close)
        self.start()

    def run(self) -> None:
        """Make blocks until no more are wanted, or there are no more."""
        try:
            while self._wait_for_place() and self._make_ahead(self._ahead):
                self._drop_surplus()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # some of them hold this object, which will hold the error
            self._error = error
        finally:
            self.over = True
            self._ready.notify()
            atexit.unregister(self.close)
            del self  # so does this frame

    def _wait_for_place(self) -> bool:
        """Wait until one more block may be made; False if no more are wanted."""
        ready = self._ready
        with ready.lock:
            ready.changed.wait_for(lambda: self.stopped or ready.closed or len(ready) < self._ahead)
            return not self.stopped

    def _drop_surplus(self) -> None:
        """Drop the oldest block for one that has just been made; those that were there before the feed stay."""
        with self._ready.lock:
            if self._drop and not self.stopped and len(self._ready) > self._depth:
                self._ready.take()
                self.dropped += 1

    def stop(self) -> None:
        """Stop after the block being made, without waiting for it; may be called anywhere, even in a finalizer."""
        if self._process.left:
            return  # in a fork, a thread that only the parent has may hold a lock
        with self._ready.lock:
            stopped, self.stopped = self.stopped, True
            self._ready.attach(0 if stopped else -1)

    def close(self) -> None:
        """Stop, and wait for the end of the block being made, unless it is this thread that makes it."""
        self.stop()
        if threading.current_thread() is not self:
            self.join()

    def has_news(self) -> bool:
        """Whether :meth:`take` has a block, an error or the end to report."""
        return self.stopped or self.over or len(self._ready) > 0

    def take(self) -> Chunk | None:
        """Once :meth:`has_news`: return the oldest block, or None at the end; raises the thread's error, once."""
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
            # Not raised as it is: a SystemExit of that thread would end this one.
            raise StreamError(f"the feed's thread died of {type(error).__name__}: {error}") from error
        finally:
            del error  # or this frame and the error would be a reference cycle
