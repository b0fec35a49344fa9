"""One endless video: blocks in, chunks of frames out; on request on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.engine import Engine
from echo_rt.engine.feeder import Feeder
from echo_rt.engine.guard import Guard
from echo_rt.engine.scheduler import Blocks, CallerNoise, Initial
from echo_rt.errors import ConfigError, StreamError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import Closing
from echo_rt.utils.device import model_context
from echo_rt.utils.process import ProcessGuard, release_on_error
from echo_rt.utils.wording import one_line

WAIT, DROP = "wait", "drop"


class Stream(Closing):
    """An endless video. Iterate it, or call ``next``; made by :meth:`echo_rt.Runtime.stream`.

    One block is generated at a time, whichever thread asks; ``set_prompt`` may be called from any thread meanwhile.
    Closing the stream, from inside the loop or from another thread, ends a running ``for`` loop after its block;
    ``next`` of a closed stream raises :class:`StreamError`, not ``StopIteration``: the video had no end.
    """

    def __init__(self, engine: Engine, blocks: Blocks) -> None:
        self._engine: Engine | None = engine
        self._blocks, self._ready = blocks, blocks.ready
        self._process = ProcessGuard()
        # Held while a block is made. Reentrant: a signal's handler may close while its own thread takes or leaves it.
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread that holds it
        self._closed = False
        self._failure: str | None = None

    # ---------------------------------------------------------------- life

    @classmethod
    def begin(
        cls,
        engine: Engine,
        prompt_embeds: Tensor,
        seed: int,
        guard: Guard | None = None,
        noise: CallerNoise | None = None,
        initial: Initial | None = None,
    ) -> Stream:
        """A new video in ``engine``'s buffers; the runtime makes sure that no other is live."""
        blocks = Blocks(engine, seed, guard, noise)
        with model_context(engine.device, engine.dtype, engine.vae_dtype):
            blocks.start(engine, prompt_embeds, initial)
        return cls(engine, blocks)

    @classmethod
    def restore(
        cls, engine: Engine, snapshot: Snapshot, guard: Guard | None = None, noise: CallerNoise | None = None
    ) -> Stream:
        """The video of ``snapshot``, at the block it was taken at; :class:`StreamError` if it is another model's."""
        if not isinstance(snapshot, Snapshot):
            raise StreamError(f"expected a Snapshot of stream.snapshot(), got {type(snapshot).__name__}")
        blocks = Blocks(engine, snapshot.seed, guard, noise)
        with model_context(engine.device, engine.dtype, engine.vae_dtype):
            blocks.restore(engine, snapshot)
        return cls(engine, blocks)

    def close(self) -> None:
        """End the video; waits for a block that is being made. Its runtime can then start another. Idempotent."""
        self._closed = True
        if self._process.left:
            self._engine = None  # without a lock, which a thread may hold that only the parent has
            return
        if self.busy_in_this_thread:
            return  # from a signal handler amid a block of this very thread: the block's end lets go
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        self._engine = None
        self._blocks.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def gone(self) -> bool:
        """Whether it has let go of the runtime's buffers: closed, and no block of it under way."""
        return self._engine is None

    @property
    def busy_in_this_thread(self) -> bool:
        """Whether the calling thread is in the middle of a block of this stream, as a signal handler can be."""
        return self._owner == threading.get_ident()

    @property
    def failure(self) -> str | None:
        """What ended the video for good, or None."""
        return self._failure

    @contextmanager
    def _exclusive(self) -> Iterator[Engine | None]:
        """The engine, for one thread at a time; None once the stream is closed."""
        self._process.require("stream")
        if self.busy_in_this_thread:
            raise StreamError("this thread is in the middle of a block of this stream")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield None if self._closed else self._engine
            finally:
                self._owner = None
                if self._closed:
                    self._let_go()

    # ---------------------------------------------------------------- video

    @property
    def next_block(self) -> int:
        """The number of the block that is handed out next: 0 at the start."""
        return self._ready.next_block

    @property
    def next_prompt_block(self) -> int:
        """The first block that a prompt can still reach: later than ``next_block`` where blocks are begun ahead."""
        return self._blocks.prompts.first_open

    @property
    def video_frames(self) -> int:
        """How many video frames have been handed out."""
        return self._blocks.first_frame(self.next_block)

    @property
    def first_frame_seconds(self) -> float | None:
        """Seconds from the start of the stream, its prompt encoded, to the first block of frames; None until then."""
        return self._blocks.first_frame_seconds

    @property
    def rollbacks(self) -> int:
        """How often the guard went back to a good state."""
        return self._blocks.rollbacks

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._take()) is not None:
            yield chunk
            del chunk  # it is not for us to keep while the next one is made

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """``async for``: blocks are made on a thread of their own; a cancelled wait loses none of them."""
        self._require_open()
        while (chunk := await self._take_async()) is not None:
            yield chunk
            del chunk

    def __next__(self) -> Chunk:
        """The next block; :class:`StreamError` once the stream is closed or has failed."""
        self._require_open()
        chunk = self._take()
        if chunk is None:
            raise StreamError("the stream was closed while a block was waited for")
        return chunk

    def feed(self, depth: int = 2, when_full: Literal["wait", "drop"] = "wait") -> Feed:
        """Run on a thread of its own, so many blocks ahead of the consumer; see :class:`echo_rt.Feed`."""
        return Feed(self, depth, when_full)

    def _require_open(self) -> None:
        self._process.require("stream")
        if self._closed:
            raise StreamError("the stream is closed; start another with runtime.stream(...)")

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise StreamError(f"the stream cannot go on: {self._failure}; start or resume another")

    @release_on_error
    def _take(self) -> Chunk | None:
        """The next block, made here unless it is ready; None once the stream is closed."""
        with self._exclusive() as engine:
            if engine is None:
                return None
            while (chunk := self._ready.take()) is None:
                self._make(engine)
            return chunk

    async def _take_async(self) -> Chunk | None:
        loop, consumer = asyncio.get_running_loop(), object()
        self._ready.attach(consumer)  # a block that is made for it comes, if the stream is closed meanwhile
        try:
            while await loop.run_in_executor(None, self._make_ahead, 1):
                if (chunk := self._ready.take()) is not None:
                    return chunk
            return None
        finally:
            self._ready.detach(consumer)

    @release_on_error
    def _make_ahead(self, depth: float) -> bool:
        """Make one block more unless ``depth`` blocks are ready; False once the stream is closed."""
        with self._exclusive() as engine:
            if engine is not None and len(self._ready) < depth:
                self._make(engine)
            return engine is not None

    def _make(self, engine: Engine) -> None:
        self._require_whole()
        with self._whole_or_over(engine):
            self._blocks.make(engine)

    @contextmanager
    def _whole_or_over(self, engine: Engine) -> Iterator[None]:
        """Work on blocks. An error ends this video, as half a block is in the buffers, but not the runtime."""
        try:
            with model_context(engine.device, engine.dtype, engine.vae_dtype):
                yield
        except BaseException as error:
            self._failure = f"block {self._ready.end} failed ({type(error).__name__}: {one_line(error)})"
            raise

    # ---------------------------------------------------------------- prompts

    @release_on_error
    def set_prompt(
        self, prompt: str | None = None, *, prompt_embeds: Tensor | None = None, block: int | None = None
    ) -> None:
        """Switch to another prompt, from any thread. The last call for a block counts.

        Args:
            prompt: the text; or ``prompt_embeds [length, text_dim]`` in its place.
            block: the number of the block that begins with it; None for the next one that has not been begun,
                :attr:`next_prompt_block`.

        Raises:
            PromptError: neither or both given, an empty prompt, embeddings that do not fit; the old prompt stays.
            StreamError: the stream is over, or ``block`` has been begun already.
        """
        engine = self._engine
        if engine is None:
            raise StreamError("the stream is closed; start another with runtime.stream(...)")
        self._require_open()
        self._require_whole()
        if block is not None and (isinstance(block, bool) or not isinstance(block, int)):
            raise ConfigError(f"block must be a block's number or None, got {block!r}")
        embeds = engine.prompts.resolve(prompt, prompt_embeds)
        self._blocks.prompts.set(embeds, block)

    # ---------------------------------------------------------------- snapshot

    def snapshot(self, path: str | Path | None = None) -> Snapshot:
        """Everything needed to go on bit for bit after the last block handed out; waits for one that is being made.

        ``path``: where to write it as well (:meth:`Snapshot.save`), once the stream may go on.
        """
        snapshot = self._snapshot()
        if path is not None:
            snapshot.save(path)
        return snapshot

    @release_on_error
    def _snapshot(self) -> Snapshot:
        self._require_open()
        with self._exclusive() as engine:
            if engine is None:
                raise StreamError("the stream was closed while a snapshot was waited for")
            self._require_whole()
            with self._whole_or_over(engine):
                return self._blocks.snapshot(engine)


class Feed(Closing):
    """Runs a stream on a thread of its own and hands its blocks out, each of them once, to any number of threads.

    Iterate it (``for`` or ``async for``), call ``next``, or :meth:`poll` it from a loop that has other things to do.
    At most ``depth`` blocks wait to be taken, so memory does not grow however slow the consumer is. Prompts are set at
    the stream; they reach :attr:`Stream.next_prompt_block`, which is behind what waits here.

    What ends the stream is raised at a consumer, once the blocks made before it have been taken. A feed that is closed,
    or that nobody holds any more, leaves the blocks that wait to the stream, which can be used on.

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
        self._ready = stream._ready
        self._feeder = Feeder(stream._ready, stream._make_ahead, depth, drop=when_full == DROP)
        weakref.finalize(self, self._feeder.stop).atexit = False

    @property
    def dropped(self) -> int:
        """How many blocks were made and dropped because nobody took them."""
        return self._feeder.policy.dropped

    @property
    def waiting(self) -> int:
        """How many blocks are made and not yet taken."""
        return 0 if self.closed else len(self._ready)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._feeder.stopped

    # ---------------------------------------------------------------- blocks

    def poll(self, timeout: float = 0.0) -> Chunk | None:
        """The next block, or None if there is none within ``timeout`` seconds.

        Raises what ended the stream; :class:`StreamError` where the feed or the stream is closed.
        """
        self._require_thread()
        with self._ready.lock:
            return next(self) if self._ready.changed.wait_for(self._feeder.has_news, timeout) else None

    def __next__(self) -> Chunk:
        """The next block, waited for; raises as :meth:`poll` does."""
        if (chunk := self._take()) is not None:
            return chunk
        self._require_open()
        self.stream._require_whole()
        raise StreamError("the stream is closed; start another with runtime.stream(...)")

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._take()) is not None:
            yield chunk
            del chunk
        self._require_whole()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self._require_open()
        while (chunk := await self._take_async()) is not None:
            yield chunk
            del chunk
        self._require_whole()

    def _take(self) -> Chunk | None:
        self._require_thread()
        with self._ready.lock:
            self._ready.changed.wait_for(self._feeder.has_news)
            return self._feeder.take()

    async def _take_async(self) -> Chunk | None:
        self._require_thread()
        with self._ready.woken() as changed:
            while True:
                with self._ready.lock:
                    if self._feeder.has_news():
                        return self._feeder.take()
                    changed.clear()
                await changed.wait()

    def _require_open(self) -> None:
        if self.closed:
            raise StreamError("the feed is closed; make another with stream.feed(...)")

    def _require_whole(self) -> None:
        if not self.closed:
            self.stream._require_whole()

    def _require_thread(self) -> None:
        # Asked before any lock is: in a fork, a thread may hold it that only the parent has.
        if not self._feeder.is_alive() and not self._feeder.over:
            raise StreamError("the feed has no thread in this process, a fork of its own; make a feed where it is used")

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """End the thread, after the block it is making, and loops over the feed. From any thread; idempotent."""
        self._feeder.stop()
        if threading.current_thread() is not self._feeder:
            self._feeder.join()

    async def __aenter__(self) -> Feed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
