"""One endless video: blocks in, chunks of frames out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats
from echo_rt.config import VaeConfig
from echo_rt.device import model_context
from echo_rt.errors import ConfigError, NumericalError, StreamError
from echo_rt.executor import Executor
from echo_rt.options import check_seed
from echo_rt.pipeline import Finished, Pipeline
from echo_rt.prompts import PromptEncoder
from echo_rt.rollout import Rollout
from echo_rt.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Engine:
    """What a runtime lends to its stream, and takes back when it closes.

    ``lookahead``: blocks that are begun before an earlier one is handed out.
    """

    device: torch.device
    dtype: torch.dtype
    rollout: Rollout
    pipeline: Pipeline
    executor: Executor
    vae: VaeConfig
    model: Mapping[str, Any]
    prompts: PromptEncoder
    lookahead: int


_ROLLOUT, _DECODER = "rollout.", "decoder."


def _live_tensors(engine: Engine) -> dict[str, Tensor]:
    named = {_ROLLOUT + name: tensor for name, tensor in engine.rollout.state.tensors().items()}
    return named | {_DECODER + name: tensor for name, tensor in engine.pipeline.decoder_state.tensors().items()}


class Stream:
    """An endless video. Iterate it, or call ``next``; made by :meth:`echo_rt.Runtime.stream`.

    One block is generated at a time, whichever thread asks; ``set_prompt`` may be called from any thread meanwhile.
    Closing the stream, from inside the loop or from another thread, ends a running ``for`` loop after its block;
    ``next`` of a closed stream raises :class:`StreamError`, not ``StopIteration``: the video had no end.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine: Engine | None = engine
        self._seed = check_seed(seed)
        self._lock = threading.Lock()  # held while a block is made
        self._owner: int | None = None  # the thread that holds it
        self._prompt_lock = threading.Lock()
        self._prompts: dict[int, Tensor] = {}  # by the block that begins with them
        self._held: deque[Chunk] = deque()  # finished, and not handed out
        self._closed = False
        self._failure: str | None = None
        self._next_block = 0
        self._begun = 0  # blocks
        self._started = time.perf_counter()
        self._first_frame_seconds: float | None = None
        self._vae, self._frames_per_block = engine.vae, engine.rollout.config.window.frames_per_block

    # ---------------------------------------------------------------- life

    @classmethod
    def begin(cls, engine: Engine, prompt_embeds: Tensor, seed: int) -> Stream:
        """A new video in ``engine``'s buffers; the runtime makes sure that no other is live."""
        stream = cls(engine, seed)
        with model_context(engine.device, engine.dtype):
            engine.pipeline.reset()
            engine.rollout.start(prompt_embeds, seed)
        return stream

    @classmethod
    def restore(cls, engine: Engine, snapshot: Snapshot) -> Stream:
        """The video of ``snapshot``, at the block it was taken at; :class:`StreamError` if it is another model's."""
        if not isinstance(snapshot, Snapshot):
            raise StreamError(f"expected a Snapshot of stream.snapshot(), got {type(snapshot).__name__}")
        different = sorted(k for k in {*engine.model, *snapshot.model} if engine.model.get(k) != snapshot.model.get(k))
        if different:
            key = different[0]
            raise StreamError(
                f"the snapshot is of another model: {key} is {snapshot.model.get(key)!r} in the snapshot and "
                f"{engine.model.get(key)!r} here ({len(different)} differences: {', '.join(different)})"
            )
        stream = cls(engine, snapshot.seed)
        frames = (snapshot.block + 1) * engine.rollout.config.window.frames_per_block
        if snapshot.block < -1 or frames != snapshot.latents_decoded or len(snapshot.held) > snapshot.block + 1:
            raise StreamError(
                f"the snapshot contradicts itself: {snapshot.latents_decoded} latents decoded and {len(snapshot.held)} "
                f"blocks held at block {snapshot.block}"
            )
        live = _live_tensors(engine)
        for name, tensor in live.items():
            saved = snapshot.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                came = "nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"
                raise StreamError(f"snapshot tensor {name}: expected {tensor.dtype} {tuple(tensor.shape)}, got {came}")
        with model_context(engine.device, engine.dtype):
            engine.pipeline.reset()
            engine.rollout.state.reset()
            engine.rollout.set_seed(snapshot.seed)
            with engine.executor.apart():
                for name, tensor in live.items():
                    tensor.copy_(snapshot.tensors[name])
            engine.executor.settle()
        engine.rollout.state.block = snapshot.block
        engine.rollout.state.memory_ready = snapshot.memory_ready
        engine.pipeline.decoder_state.latents_seen = snapshot.latents_decoded
        stream._prompts = dict(snapshot.prompts)
        stream._held.extend(snapshot.held)
        stream._begun = snapshot.block + 1
        stream._next_block = snapshot.next_block
        return stream

    def close(self) -> None:
        """End the video; waits for a block that is being made. Its runtime can then start another. Idempotent."""
        self._closed = True
        if self.busy_in_this_thread:
            return  # from a signal handler amid a block of this very thread: the block's end lets go
        with self._lock:
            self._engine = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

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
        if self.busy_in_this_thread:
            raise StreamError("this thread is in the middle of a block of this stream")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield None if self._closed else self._engine
            finally:
                self._owner = None
                if self._closed:
                    self._engine = None

    # ---------------------------------------------------------------- video

    @property
    def next_block(self) -> int:
        """The number of the block that is handed out next: 0 at the start."""
        return self._next_block

    @property
    def next_prompt_block(self) -> int:
        """The first block that a prompt can still reach: later than ``next_block`` where blocks are begun ahead."""
        return self._begun

    @property
    def video_frames(self) -> int:
        """How many video frames have been handed out."""
        return self._first_frame(self._next_block)

    @property
    def first_frame_seconds(self) -> float | None:
        """Seconds from the start of the stream, its prompt encoded, to the first block of frames; None until then."""
        return self._first_frame_seconds

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._make_chunk()) is not None:
            yield chunk

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """``async for``: blocks are made on a thread of their own; a cancelled wait loses none of them."""
        self._require_open()
        loop = asyncio.get_running_loop()
        while True:
            coming = loop.run_in_executor(None, self._make_chunk)
            try:
                chunk = await asyncio.shield(coming)
            except asyncio.CancelledError:
                coming.add_done_callback(self._take_back)
                raise
            if chunk is None:
                return
            yield chunk

    def _take_back(self, coming: asyncio.Future[Chunk | None]) -> None:
        """A block that nobody waited for any more is the next to be handed out."""
        if coming.cancelled() or coming.exception() is not None:
            return  # an exception has ended the stream, which says so when it is used again
        chunk = coming.result()
        if chunk is not None:
            self._held.appendleft(chunk)
            self._next_block = chunk.index

    def __next__(self) -> Chunk:
        """The next block; :class:`StreamError` once the stream is closed or has failed."""
        self._require_open()
        chunk = self._make_chunk()
        if chunk is None:
            raise StreamError("the stream was closed while a block was waited for")
        return chunk

    def _require_open(self) -> None:
        if self._closed:
            raise StreamError("the stream is closed; start another with runtime.stream(...)")

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise StreamError(f"the stream cannot go on: {self._failure}; start or resume another")

    def _make_chunk(self) -> Chunk | None:
        with self._exclusive() as engine:
            if engine is None:
                return None
            self._require_whole()
            with self._whole_or_over(engine):
                if not self._held:
                    while engine.pipeline.in_flight <= engine.lookahead:
                        self._begin_block(engine)
                    self._finish_block(engine)
            chunk = self._held.popleft()
            self._next_block = chunk.index + 1
            return chunk

    @contextmanager
    def _whole_or_over(self, engine: Engine) -> Iterator[None]:
        """Work on blocks: what goes wrong in it ends this video, as half a block is in the buffers; not the runtime."""
        try:
            with model_context(engine.device, engine.dtype):
                yield
        except BaseException as error:
            self._failure = f"block {self._next_block} failed ({type(error).__name__}: {error})"
            raise

    def _begin_block(self, engine: Engine) -> None:
        with self._prompt_lock:
            block, self._begun = self._begun, self._begun + 1
            due = [at for at in self._prompts if at <= block]
            prompt = self._prompts[max(due)] if due else None
            for at in due:
                del self._prompts[at]
        if prompt is not None:
            engine.rollout.switch_prompt(prompt)
        engine.pipeline.begin()

    def _finish_block(self, engine: Engine) -> None:
        made = engine.pipeline.finish()
        _require_finite(made)
        stats = ChunkStats(
            generate_seconds=made.generate_seconds,
            decode_seconds=made.decode_seconds,
            newest_temporal_id=made.position.newest_temporal_id,
            shift=made.position.shift,
            memory_attended=made.memory_attended,
            vitals=made.vitals,
        )
        first = self._first_frame(made.index)
        self._held.append(
            Chunk(index=made.index, frames=made.frames, first_frame=first, latents=made.latents, stats=stats)
        )
        if self._first_frame_seconds is None:
            self._first_frame_seconds = time.perf_counter() - self._started

    def _first_frame(self, block: int) -> int:
        return self._vae.video_frames(block * self._frames_per_block)

    # ---------------------------------------------------------------- prompts

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
        with self._prompt_lock:
            if block is not None and block < self._begun:
                raise StreamError(f"block {block} has been begun; a prompt can begin with {self._begun} or later")
            self._prompts[self._begun if block is None else block] = embeds

    # ---------------------------------------------------------------- snapshot

    def snapshot(self) -> Snapshot:
        """Everything needed to go on bit for bit after the last whole block; waits for one that is being made."""
        self._require_open()
        with self._exclusive() as engine:
            if engine is None:
                raise StreamError("the stream was closed while a snapshot was waited for")
            self._require_whole()
            with self._whole_or_over(engine):
                while engine.pipeline.in_flight:
                    self._finish_block(engine)
                with engine.executor.apart():
                    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in _live_tensors(engine).items()}
            with self._prompt_lock:
                prompts = dict(self._prompts)
            state = engine.rollout.state
            return Snapshot(
                model=dict(engine.model),
                seed=self._seed,
                block=state.block,
                memory_ready=state.memory_ready,
                latents_decoded=engine.pipeline.decoder_state.latents_seen,
                tensors=tensors,
                prompts=prompts,
                held=tuple(self._held),
            )


def _require_finite(made: Finished) -> None:
    for what, bad, values in (
        ("latent", made.vitals.latent_nonfinite, made.latents),
        ("decoded video", made.vitals.video_nonfinite, made.frames),
    ):
        if bad:
            raise NumericalError(f"block {made.index}: {what}: {bad} of {values.numel()} values are NaN or infinite")
