"""One endless video: blocks in, chunks of frames out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import Guard
from echo_rt.engine.scheduler import Blocks, Initial
from echo_rt.errors import ConfigError, StreamError
from echo_rt.feed import Feed
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.device import model_context
from echo_rt.utils.process import ProcessGuard, release_on_error
from echo_rt.utils.wording import one_line


class Taker(Protocol):
    """Who a block is made for."""

    def deliver(self, chunk: Chunk) -> list[Chunk]:
        """``chunk`` is there; what nobody waits for any more, ``chunk`` or more than it, the newest first."""


class _Wanted:
    """Whether somebody still waits for a block: a cancelled wait and the block's end meet here, in either order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._chunk: Chunk | None = None

    def deliver(self, chunk: Chunk) -> list[Chunk]:
        with self._lock:
            self._chunk = chunk
            return [chunk] if self._cancelled else []

    def cancel(self) -> Chunk | None:
        """Nobody waits any more; the block, where it had been delivered."""
        with self._lock:
            self._cancelled = True
            return self._chunk


class Stream:
    """An endless video. Iterate it, or call ``next``; made by :meth:`echo_rt.Runtime.stream`.

    One block is generated at a time, whichever thread asks; ``set_prompt`` may be called from any thread meanwhile.
    Closing the stream, from inside the loop or from another thread, ends a running ``for`` loop after its block;
    ``next`` of a closed stream raises :class:`StreamError`, not ``StopIteration``: the video had no end.
    """

    def __init__(self, engine: Engine, blocks: Blocks) -> None:
        self._engine: Engine | None = engine
        self._blocks = blocks
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
        initial: Initial | None = None,
    ) -> Stream:
        """A new video in ``engine``'s buffers; the runtime makes sure that no other is live."""
        blocks = Blocks(engine, seed, guard)
        with model_context(engine.device, engine.dtype, engine.vae_dtype):
            blocks.start(engine, prompt_embeds, initial)
        return cls(engine, blocks)

    @classmethod
    def restore(cls, engine: Engine, snapshot: Snapshot, guard: Guard | None = None) -> Stream:
        """The video of ``snapshot``, at the block it was taken at; :class:`StreamError` if it is another model's."""
        if not isinstance(snapshot, Snapshot):
            raise StreamError(f"expected a Snapshot of stream.snapshot(), got {type(snapshot).__name__}")
        blocks = Blocks(engine, snapshot.seed, guard)
        with model_context(engine.device, engine.dtype, engine.vae_dtype):
            blocks.restore(engine, snapshot)
        return cls(engine, blocks)

    def close(self) -> None:
        """End the video; waits for a block that is being made. Its runtime can then start another. Idempotent."""
        self._closed = True
        if self._process.left:
            self._let_go()  # without the lock, which a thread may hold that only the parent has
            return
        if self.busy_in_this_thread:
            return  # from a signal handler amid a block of this very thread: the block's end lets go
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        self._engine = None
        self._blocks.forget()

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

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        return self._blocks.next_block

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
        while (chunk := self._make_chunk()) is not None:
            yield chunk
            del chunk  # it is not for us to keep while the next one is made

    def feed(self, depth: int = 2, when_full: Literal["wait", "drop"] = "wait") -> Feed:
        """Run on a thread of its own, so many blocks ahead of the consumer; see :class:`echo_rt.Feed`."""
        return Feed(self, depth, when_full)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """``async for``: blocks are made on a thread of their own; a cancelled wait loses none of them."""
        self._require_open()
        loop = asyncio.get_running_loop()
        while True:
            wanted = _Wanted()
            try:
                chunk = await loop.run_in_executor(None, self._make_chunk, wanted)
            except asyncio.CancelledError:
                if (made := wanted.cancel()) is not None:
                    self._put_back([made])
                raise
            if chunk is None:
                return
            yield chunk
            del chunk, wanted

    def _give_back(self, chunks: list[Chunk]) -> None:
        """``chunks``, the last ones that were handed out, the newest first, are the next ones again."""
        if chunks and not self._process.left:
            with self._exclusive():
                self._put_back(chunks)

    def _put_back(self, chunks: list[Chunk]) -> None:
        if not self._closed:
            for chunk in chunks:
                self._blocks.give_back(chunk)

    def __next__(self) -> Chunk:
        """The next block; :class:`StreamError` once the stream is closed or has failed."""
        self._require_open()
        chunk = self._make_chunk()
        if chunk is None:
            raise StreamError("the stream was closed while a block was waited for")
        return chunk

    def _require_open(self) -> None:
        self._process.require("stream")
        if self._closed:
            raise StreamError("the stream is closed; start another with runtime.stream(...)")

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise StreamError(f"the stream cannot go on: {self._failure}; start or resume another")

    @release_on_error
    def _make_chunk(self, taker: Taker | None = None) -> Chunk | None:
        with self._exclusive() as engine:
            if engine is None:
                return None
            chunk = self._blocks.left_over()
            if chunk is None:
                self._require_whole()
                with self._whole_or_over(engine):
                    chunk = self._blocks.next(engine)
            if taker is not None:
                self._put_back(taker.deliver(chunk))  # before anyone else can ask for the next one
            return chunk

    @contextmanager
    def _whole_or_over(self, engine: Engine) -> Iterator[None]:
        """Work on blocks: what goes wrong in it ends this video, as half a block is in the buffers; not the runtime."""
        try:
            with model_context(engine.device, engine.dtype, engine.vae_dtype):
                yield
        except BaseException as error:
            self._failure = f"block {self.next_block} failed ({type(error).__name__}: {one_line(error)})"
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
