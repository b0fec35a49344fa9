"""A stream on a thread of its own: blocks are made ahead of the one who shows them, and never more than so many."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn

from echo_rt.errors import ConfigError, StreamError

if TYPE_CHECKING:
    from echo_rt.chunk import Chunk
    from echo_rt.stream import Stream

WAIT, DROP = "wait", "drop"


class _Channel:
    """What the thread and the consumers share. It does not know the feed, so that a forgotten feed can be freed."""

    def __init__(self, depth: int, drop: bool) -> None:
        self.depth, self.drop = depth, drop
        # Its lock is reentrant: the garbage collector may end a feed while this thread is in here.
        self.changed = threading.Condition()
        self.blocks: deque[Chunk] = deque()
        self.dropped = 0
        self.stopped = False  # by the consumer: nothing more is wanted
        self.over = False  # by the thread: nothing more comes
        self.error: BaseException | None = None
        self.sleepers: set[Callable[[], None]] = set()

    # ---------------------------------------------------------------- the thread's side

    def room(self) -> bool:
        """Wait until one more block may be made; False when none is wanted any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.drop or len(self.blocks) < self.depth)
            return not self.stopped

    def deliver(self, chunk: Chunk) -> list[Chunk]:
        with self.changed:
            if self.drop and not self.stopped and len(self.blocks) == self.depth:
                self.blocks.popleft()
                self.dropped += 1
            self.blocks.append(chunk)
            self._wake()
            return self.left_over()

    def finish(self, error: BaseException | None) -> None:
        with self.changed:
            self.error, self.over = error, True
            self._wake()

    def left_over(self) -> list[Chunk]:
        """What nobody will take any more, where that is so, the newest first; from then on it is not here."""
        with self.changed:
            chunks = list(reversed(self.blocks)) if self.stopped else []
            if self.stopped:
                self.blocks.clear()
            return chunks

    # ---------------------------------------------------------------- the consumers' side

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self._wake()

    def ready(self) -> bool:
        return self.stopped or self.over or bool(self.blocks)

    def take(self) -> Chunk | None:
        """Once :meth:`ready`: the oldest block; None at the end; raises what ended the stream, once."""
        with self.changed:
            if self.stopped:
                return None
            if self.blocks:
                chunk = self.blocks.popleft()
                self._wake()
                return chunk
            error, self.error = self.error, None
        if error is None:
            return None
        try:
            if isinstance(error, Exception):
                raise error
            # Raised here, a SystemExit of that thread would end this one.
            raise StreamError(f"the feed's thread died of {type(error).__name__}: {error}") from error
        finally:
            del error  # or this frame and the error would keep each other alive

    def _wake(self) -> None:
        self.changed.notify_all()
        for sleeper in self.sleepers:
            sleeper()


def _pump(stream: Stream, channel: _Channel) -> None:
    """The thread: from the stream into the channel, until one of the two ends."""
    error: BaseException | None = None
    try:
        while channel.room() and stream._make_chunk(channel) is not None:
            pass  # the channel has it
    except BaseException as caught:
        error = caught
        traceback.clear_frames(error.__traceback__)  # some hold the channel, which is to hold the error
    finally:
        stream._give_back(channel.left_over())
        channel.finish(error)
        _running.pop(threading.current_thread(), None)
        del stream, channel, error  # this frame is one of them


# The threads are daemons, so that a forgotten one cannot keep the interpreter from its end; but what torch does in a
# thread must be over before the interpreter is torn down.
_running: dict[threading.Thread, _Channel] = {}


@atexit.register
def _end_all() -> None:
    for thread, channel in list(_running.items()):
        if thread.is_alive():  # those of a process that this one was forked from are not
            channel.stop()
            thread.join()


def _forget(stream: Stream, channel: _Channel) -> None:
    """The end of a feed that nobody holds. It may come in any thread, amid anything: so it waits for nothing."""
    channel.stop()
    # A block that is being made takes the others along when it is done; else nobody may come before them.
    if not stream.busy_in_this_thread and stream._lock.acquire(blocking=False):
        try:
            stream._put_back(channel.left_over())
        finally:
            stream._lock.release()


class Feed:
    """Runs a stream on a thread of its own and hands its blocks out, each of them once, to any number of threads.

    Iterate it (``for`` or ``async for``), call ``next``, or :meth:`poll` it from a loop that has other things to do.
    At most ``depth`` blocks wait to be taken, so memory does not grow however slow the consumer is. Prompts are set at
    the stream; they reach :attr:`Stream.next_prompt_block`, which is behind what waits here.

    What ends the stream is raised at a consumer, once the blocks made before it have been taken. A feed that is closed,
    or that nobody holds any more, gives the blocks that wait in it back to the stream, which can be used on.

    Args:
        stream: an open stream; while the feed runs, leave its blocks to the feed.
        depth: how many blocks may wait, 1 or more.
        when_full: ``"wait"``: the stream pauses until one is taken. ``"drop"``: it goes on, and the oldest waiting
            block is dropped and counted in :attr:`dropped`.

    Raises:
        ConfigError: a depth or ``when_full`` that cannot be.
        StreamError: the stream is closed.
    """

    def __init__(self, stream: Stream, depth: int = 2, when_full: Literal["wait", "drop"] = "wait") -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ConfigError(f"depth must be a number of blocks, 1 or more, got {depth!r}")
        if when_full not in (WAIT, DROP):
            raise ConfigError(f"when_full must be {WAIT!r} or {DROP!r}, got {when_full!r}")
        stream._require_open()
        self.stream = stream
        self._channel = _Channel(depth, when_full == DROP)
        self._thread = threading.Thread(target=_pump, args=(stream, self._channel), name="echo_rt feed", daemon=True)
        weakref.finalize(self, _forget, stream, self._channel).atexit = False
        _running[self._thread] = self._channel
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many blocks were made and dropped because nobody took them."""
        return self._channel.dropped

    @property
    def waiting(self) -> int:
        """How many blocks are made and not yet taken."""
        return len(self._channel.blocks)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._channel.stopped

    # ---------------------------------------------------------------- blocks

    def poll(self, timeout: float = 0.0) -> Chunk | None:
        """The next block, or None if there is none within ``timeout`` seconds.

        Raises what ended the stream; :class:`StreamError` where the feed or the stream is closed.
        """
        chunk = self._take(timeout)
        if chunk is None and self._channel.ready():
            self._raise_over()
        return chunk

    def __next__(self) -> Chunk:
        """The next block, waited for; raises as :meth:`poll` does."""
        chunk = self._take(None)
        if chunk is None:
            self._raise_over()
        return chunk

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._take(None)) is not None:
            yield chunk
            del chunk
        self._require_whole()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self._require_open()
        while (chunk := await self._take_async()) is not None:
            yield chunk
            del chunk
        self._require_whole()

    def _take(self, timeout: float | None) -> Chunk | None:
        self._require_thread()
        with self._channel.changed:
            if not self._channel.changed.wait_for(self._channel.ready, timeout):
                return None
            return self._channel.take()

    async def _take_async(self) -> Chunk | None:
        """No thread waits for it, and a cancelled wait has taken nothing."""
        self._require_thread()
        loop, channel = asyncio.get_running_loop(), self._channel
        woken = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits in it
                loop.call_soon_threadsafe(woken.set)

        with channel.changed:
            if not channel.ready():
                channel.sleepers.add(wake)
        try:
            while True:
                with channel.changed:
                    if channel.ready():
                        return channel.take()
                    woken.clear()
                await woken.wait()
        finally:
            with channel.changed:
                channel.sleepers.discard(wake)

    def _require_open(self) -> None:
        if self._channel.stopped:
            raise StreamError("the feed is closed; make another with stream.feed(...)")

    def _require_whole(self) -> None:
        if not self._channel.stopped:
            self.stream._require_whole()

    def _raise_over(self) -> NoReturn:
        self._require_open()
        self.stream._require_whole()
        raise StreamError("the stream is closed; start another with runtime.stream(...)")

    def _require_thread(self) -> None:
        if not self._thread.is_alive() and not self._channel.over:
            raise StreamError("the feed has no thread in this process, a fork of its own; make a feed where it is used")

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """End the thread, after the block it is making, and loops over the feed. From any thread; idempotent."""
        if self._thread.is_alive() or self._channel.over:
            self._channel.stop()
            if threading.current_thread() is not self._thread:
                self._thread.join()
                self.stream._give_back(self._channel.left_over())  # of a thread that had ended before

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Feed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
