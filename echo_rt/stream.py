"""One endless video as an iterator over its blocks, on request made by a thread of their own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.engine import Engine
from echo_rt.engine.prompts import check_over
from echo_rt.engine.ready import Feeder
from echo_rt.engine.scheduler import Blocks
from echo_rt.errors import ConfigError, StreamError
from echo_rt.options import explains_habits, is_number, is_path, is_whole
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import Closing
from echo_rt.utils.device import model_context
from echo_rt.utils.process import Bound, ProcessGuard, computes, interrupts_last
from echo_rt.utils.wording import one_line, type_of

WAIT, DROP = "wait", "drop"
_CLOSED = "the stream is closed; start another with runtime.stream(...)"


class _Source(Closing, Bound):
    """Hands out blocks, each of them once: to ``for``, ``async for``, ``next`` and ``anext``."""

    _process: ProcessGuard

    @abstractmethod
    def _take(self) -> Chunk | None:
        """Wait for the next block; None once there are no more."""

    @abstractmethod
    async def _take_async(self) -> Chunk | None: ...

    @abstractmethod
    def _require_open(self) -> None:
        """Raise :class:`StreamError` once it is closed."""

    def _end(self) -> None:
        """Raise what there is to say when no more blocks come."""

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._take()) is not None:
            yield chunk
            del chunk  # free it while the next one is made
        self._end()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Iterate with ``async for``: another thread makes the blocks, and a cancelled wait loses none of them."""
        self._require_open()
        while (chunk := await self._take_async()) is not None:
            yield chunk
            del chunk
        self._end()

    def __next__(self) -> Chunk:
        """Return the next block; :class:`StreamError` once it is closed, or the stream is closed or has failed."""
        return self._required(self._take())

    async def __anext__(self) -> Chunk:
        """Return the next block as ``next`` does, with ``await anext(...)``."""
        return self._required(await self._take_async())

    def _required(self, chunk: Chunk | None) -> Chunk:
        if chunk is None:
            self._require_open()
            self._end()
            self._process.require("stream")
            raise StreamError(_CLOSED)
        return chunk


class Stream(_Source):
    """An endless video, made by :meth:`echo_rt.Runtime.stream`. Iterate it, or call ``next``.

    Any thread may ask for blocks, which are made one at a time, and call ``set_prompt`` meanwhile. Closing the stream,
    inside a ``for`` loop or from another thread, ends the loop after its block; ``next`` of a closed stream raises
    :class:`StreamError`, not ``StopIteration``, as the video has no end.

    Attributes:
        closed: whether :meth:`close` was called.
        failure: the error that ended the video, in words, or None.
    """

    _instead = "take a snapshot(), which can be pickled, and resume it on a runtime of its own"
    _made_by = "runtime.stream(PROMPT)"

    def __init__(self, *, engine: Engine, blocks: Blocks, process: ProcessGuard) -> None:
        self._engine: Engine | None = engine
        self._blocks, self._ready, self._process = blocks, blocks.ready, process
        # Held while a block is made. Reentrant: a signal handler may close while its thread acquires or releases it.
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread that holds it
        self.closed = False
        self.failure: str | None = None
        engine.prompts.hold(blocks)

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.failure or f"next block {self.next_block}"
        return f"<Stream {self.prompt!r:.60}, seed {self.seed}, {state}>"

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """End the video, after the block being made; its runtime can then start another. Idempotent."""
        self.closed = True
        if self._process.left:
            self._engine = None  # without a lock, which a thread may hold that only the parent has
            return
        if self._busy_here:
            return  # in a signal handler amid a block of this thread: the block's end releases the engine
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._engine is not None:
            self._engine.prompts.let_go(self._blocks)
        self._engine = None  # the runtime's buffers are free for another stream
        self._blocks.close()

    @property
    def _busy_here(self) -> bool:
        """Whether the calling thread is making a block of this stream, as in a signal handler."""
        return self._owner == threading.get_ident()

    @contextmanager
    def _exclusive(self) -> Iterator[Engine | None]:
        """Yield the engine, for one thread at a time; None once the stream is closed."""
        self._process.require_here("stream")
        if self._busy_here:
            raise StreamError("this thread is in the middle of a block of this stream")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield None if self.closed else self._engine
            finally:
                self._owner = None
                if self.closed:
                    self._let_go()

    # ---------------------------------------------------------------- video

    @property
    def next_block(self) -> int:
        """Number of the next block to be handed out; 0 at the start, unless given blocks are not handed out."""
        return self._ready.next_block

    @property
    def next_prompt_block(self) -> int:
        """Number of the first block that a new prompt can begin with, after those that are begun ahead."""
        return self._blocks.prompts.first_open

    @property
    def frames_until_prompt(self) -> int:
        """Number of frames that come before those of a prompt that is set now: of the blocks that wait or are begun."""
        return self._blocks.first_frame(self.next_prompt_block) - self.video_frames

    @property
    def prompt(self) -> str | None:
        """Text of the prompt at :attr:`next_prompt_block`; None if only embeddings are known of it."""
        prompt = self._blocks.prompts.next
        return None if prompt is None else prompt.text

    @property
    def seed(self) -> int:
        """The seed of the noise; each rollback of the guard changes it."""
        return self._blocks.seed

    @property
    def skipped(self) -> int:
        """Number of blocks that ``set_prompt(..., flush=True)`` has dropped."""
        return self._ready.skipped

    @property
    def video_frames(self) -> int:
        """Number of video frames before :attr:`next_block`."""
        return self._blocks.first_frame(self.next_block)

    @property
    def first_frame_seconds(self) -> float | None:
        """Seconds from the start, after its prompt was encoded, to the first block's frames; None until then."""
        return self._blocks.first_frame_seconds

    @property
    def rollbacks(self) -> int:
        """Number of times that the guard went back to a good state."""
        return self._blocks.rollbacks

    def feed(self, depth: int = 2, when_full: Literal["wait", "drop"] = "wait") -> Feed:
        """Make blocks on another thread, up to ``depth`` ahead of the consumer; see :class:`echo_rt.Feed`."""
        return Feed(self, depth, when_full)

    def _require_open(self) -> None:
        self._process.require("stream")
        if self.closed:
            raise StreamError(_CLOSED)

    def _require_whole(self) -> None:
        if self.failure is not None:
            raise StreamError(f"the stream cannot go on: {self.failure}; start or resume another")

    @computes
    def _take(self) -> Chunk | None:
        """Return the next block, and make it unless it is ready; None once the stream is closed."""
        with self._exclusive() as engine:
            if engine is None:
                return None
            while (chunk := self._ready.take()) is None:
                self._make(engine)
            return chunk

    async def _take_async(self) -> Chunk | None:
        self._ready.attach(1)  # it still gets its block if the stream is closed meanwhile
        try:
            while await asyncio.get_running_loop().run_in_executor(None, self._make_ahead, 1):
                if (chunk := self._ready.take()) is not None:
                    return chunk
            return None
        finally:
            self._ready.attach(-1)

    @computes
    def _make_ahead(self, depth: float) -> bool:
        """Make one more block unless ``depth`` are ready; returns False once the stream is closed."""
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
        """Work on blocks; an error ends this video, whose buffers hold half a block, but not the runtime."""
        with interrupts_last():
            try:
                with model_context(engine.device, engine.dtype, engine.vae_dtype):
                    yield
            except BaseException as error:
                self.failure = f"block {self._ready.end} failed ({type(error).__name__}: {one_line(error)})"
                raise

    # ---------------------------------------------------------------- prompts

    @computes
    @explains_habits
    def set_prompt(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        block: int | None = None,
        over: int = 1,
        flush: bool = False,
    ) -> None:
        """Switch to another prompt; may be called from any thread. The last call for a block counts.

        Args:
            prompt: the text; or ``prompt_embeds [length, text_dim]`` in its place.
            block: number of the block that begins with it; None for :attr:`next_prompt_block`.
            over: number of blocks in which to blend from the old prompt: the embeddings change by equal steps, one per
                block. Another prompt that begins meanwhile ends the blend. A recipe that rebuilds the memory does so at
                the first of them.
            flush: drop the blocks that are made or begun, so that the next one handed out begins with the prompt. The
                video jumps: their numbers are skipped, and counted in :attr:`skipped`.

        Raises:
            PromptError: neither or both given, an empty prompt, embeddings that do not fit; the old prompt stays.
            StreamError: the stream is closed or has failed, or ``block`` has begun; a blend without the old embeddings,
                which snapshots of older versions lack.
            ConfigError: an invalid ``block`` or ``over``, or ``flush`` beside ``block``.
        """
        self._require_open()
        self._require_whole()
        engine = self._engine
        if engine is None:
            raise StreamError(_CLOSED)
        if block is not None and (isinstance(block, bool) or not isinstance(block, int)):
            raise ConfigError(f"block must be a block's number or None, got {block!r}")
        if flush and block is not None:
            raise ConfigError(f"flush makes way for the prompt at once: expected no block beside it, got {block}")
        check_over(over)
        begins = self._blocks.prompts.set(replace(engine.prompts.resolve(prompt, prompt_embeds), over=over), block)
        if flush:
            self._ready.skip_to(begins)

    @computes
    def snapshot(self, path: str | Path | None = None) -> Snapshot:
        """Copy everything needed to continue bit for bit after the last block handed out.

        Waits for a block that is being made. ``path``: a file to write it to as well (:meth:`Snapshot.save`), while the
        stream may already go on; :class:`ConfigError` for what is no path.
        """
        self._require_open()
        if path is not None and not is_path(path):
            raise ConfigError(f"path must be a file's path or None, got {path!r}")
        with self._exclusive() as engine:
            self._require_open()
            self._require_whole()
            assert engine is not None
            with self._whole_or_over(engine):
                snapshot = self._blocks.snapshot(engine)
        if path is not None:
            snapshot.save(path)
        return snapshot


class Feed(_Source):
    """Makes a stream's blocks on another thread and hands out each of them once, to any number of threads.

    Iterate it (``for`` or ``async for``), call ``next``, or :meth:`poll` it from a loop that has other work. The thread
    pauses, or drops blocks, once ``depth`` blocks wait, so memory does not grow however slow the consumer is. Prompts
    are set on the stream; they take effect at :attr:`Stream.next_prompt_block`, after the blocks that wait.

    An error that ends the stream is raised to a consumer, once the blocks made before it have been taken. A feed that
    is closed, or that nobody holds any more, leaves waiting blocks to the stream, which can be used further.

    Args:
        stream: an open stream; take no blocks from it while the feed runs.
        depth: number of blocks that may wait, 1 or more.
        when_full: ``"wait"`` pauses until a block is taken; ``"drop"`` goes on, and drops the oldest waiting block,
            which :attr:`dropped` counts.

    Raises:
        ConfigError: an invalid ``depth`` or ``when_full``.
        StreamError: the stream is closed.
    """

    _instead = "pass its blocks on, or make another feed where it is used"
    _made_by = "stream.feed(depth=2, when_full='wait')"

    def __init__(self, stream: Stream, depth: int = 2, when_full: Literal["wait", "drop"] = "wait") -> None:
        if not isinstance(stream, Stream):
            raise ConfigError(f"expected a Stream, which runtime.stream(...) makes, got {type_of(stream)}")
        if not is_whole(depth, 1):
            raise ConfigError(f"depth must be a number of blocks, 1 or more, got {depth!r}")
        if when_full not in (WAIT, DROP):
            raise ConfigError(f"when_full must be {WAIT!r} or {DROP!r}, got {when_full!r}")
        stream._require_open()
        self.stream, self._ready, self._process = stream, stream._ready, stream._process
        self._feeder = Feeder(stream._ready, stream._make_ahead, depth, drop=when_full == DROP)
        weakref.finalize(self, self._feeder.stop).atexit = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.waiting} waiting, {self.dropped} dropped"
        return f"<Feed of {self.stream!r}, {state}>"

    @property
    def dropped(self) -> int:
        """Number of blocks that were made and dropped because nobody took them."""
        return self._feeder.dropped

    @property
    def waiting(self) -> int:
        """Number of blocks that are made and not yet taken."""
        return 0 if self.closed else len(self._ready)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._feeder.stopped

    # ---------------------------------------------------------------- blocks

    def poll(self, timeout: float = 0.0) -> Chunk | None:
        """Return the next block, or None if there is none within ``timeout`` seconds.

        Raises the error that ended the stream; :class:`StreamError` once the feed or the stream is closed.
        """
        if not is_number(timeout):
            raise ConfigError(f"timeout must be a number of seconds, got {timeout!r:.40}")
        self._process.require_here("feed")  # before any lock, which in a fork a thread of the parent may hold
        with self._ready.lock:
            return next(self) if self._ready.changed.wait_for(self._feeder.has_news, timeout) else None

    def _take(self) -> Chunk | None:
        self._process.require_here("feed")
        with self._ready.lock:
            self._ready.changed.wait_for(self._feeder.has_news)
            return self._feeder.take()

    async def _take_async(self) -> Chunk | None:
        self._process.require_here("feed")
        while True:
            with self._ready.lock:
                if self._feeder.has_news():
                    return self._feeder.take()
                news = asyncio.wrap_future(self._ready.news)
            await asyncio.wait([news])  # which, unlike a plain await, does not cancel it for all

    def _require_open(self) -> None:
        if self.closed:
            self.stream._require_open()
            raise StreamError("the feed is closed; make another with stream.feed(...)")

    def _end(self) -> None:
        if not self.closed:
            self.stream._require_whole()

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """End the thread, after the block it is making, and loops over the feed. From any thread; idempotent."""
        self._feeder.close()

    async def __aenter__(self) -> Feed:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
