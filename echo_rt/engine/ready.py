"""Finished blocks that wait for a consumer: the one place where a block is until somebody has taken it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from echo_rt.chunk import Chunk


@dataclass(eq=False)
class DropOldest:
    """A policy for a queue that nobody empties in time: at most ``depth`` blocks wait, and older ones are dropped."""

    depth: int
    dropped: int = 0


class ReadyQueue:
    """Finished blocks of one video, oldest first. Any thread may append and take; no call waits for a block.

    Taking is one step and the last of every wait, so a wait that is cancelled, interrupted or timed out has taken
    nothing. ``end`` is the number of the block that is finished next; ``policy`` says what happens to a block too many.

    A closed queue keeps its blocks as long as a consumer is attached, which is still to get what was made for it.
    """

    def __init__(self, blocks: Iterable[Chunk] = (), end: int = 0) -> None:
        # Reentrant: a signal handler or the garbage collector may end a feed while its own thread is in here.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.end = end
        self.policy: DropOldest | None = None
        self.closed = False
        self._blocks = deque(blocks)
        self._consumers: set[object] = set()
        self._wakers: set[Callable[[], None]] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def next_block(self) -> int:
        """The number of the block that is taken next, ready or not."""
        end = self.end  # read before the blocks: another thread may append or take meanwhile
        try:
            return self._blocks[0].index
        except IndexError:
            return end

    @property
    def blocks(self) -> tuple[Chunk, ...]:
        """A copy of what waits, oldest first."""
        with self.lock:
            return tuple(self._blocks)

    def append(self, chunk: Chunk) -> None:
        """Add a finished block; where the policy has no place for it, the oldest is dropped."""
        with self.lock:
            policy = self.policy
            if policy is not None and len(self._blocks) >= policy.depth:
                self.take()
                policy.dropped += 1
            self._blocks.append(chunk)
            self.end = chunk.index + 1
            self.notify()

    def take(self) -> Chunk | None:
        """The oldest block, which is the caller's from then on; None if there is none."""
        with self.lock:
            self.notify()  # whoever waits for a free place looks when this thread has left
            try:
                return self._blocks.popleft()
            except IndexError:  # asked for in one step: a signal handler may clear it between two
                return None

    def notify(self) -> None:
        """Let everyone that waits for a change look again."""
        with self.lock:
            self.changed.notify_all()
            for wake in tuple(self._wakers):  # a copy: the garbage collector may end a wait meanwhile
                wake()

    # ---------------------------------------------------------------- consumers

    @contextlib.contextmanager
    def woken(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that every change sets."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits in it
                loop.call_soon_threadsafe(event.set)

        with self.lock:
            self._wakers.add(wake)
        try:
            yield event
        finally:
            with self.lock:
                self._wakers.discard(wake)

    def attach(self, consumer: object) -> None:
        """Keep blocks for ``consumer`` after :meth:`close` too, until it is detached."""
        with self.lock:
            self._consumers.add(consumer)

    def detach(self, consumer: object) -> None:
        """``consumer`` takes no more blocks; what waits stays for others, unless the queue is closed."""
        with self.lock:
            self._consumers.discard(consumer)
            self._clear_if_abandoned()
            self.notify()

    def close(self) -> None:
        """Nothing more is appended: free what no attached consumer is to get. Idempotent."""
        with self.lock:
            self.closed = True
            self._clear_if_abandoned()
            self.notify()

    def _clear_if_abandoned(self) -> None:
        if self.closed and not self._consumers:
            self.end = self.next_block
            self._blocks.clear()
