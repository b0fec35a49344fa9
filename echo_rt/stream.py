"""One endless video: blocks in, chunks of frames out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.config import VaeConfig
from echo_rt.device import model_context
from echo_rt.errors import NumericalError, StreamError
from echo_rt.model.vae_decoder import VaeDecoder, VaeDecoderState
from echo_rt.noise import CounterNoise
from echo_rt.ops import Ops
from echo_rt.prompts import PromptEncoder
from echo_rt.rollout import Rollout
from echo_rt.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Engine:
    """What a runtime lends to its stream, and takes back when it closes."""

    device: torch.device
    dtype: torch.dtype
    rollout: Rollout
    decoder: VaeDecoder
    decoder_state: VaeDecoderState
    vae: VaeConfig
    ops: Ops
    model: Mapping[str, Any]
    prompts: PromptEncoder

    def settle(self) -> None:
        """Wait until what was written on this thread's CUDA stream can be used on any other."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_ROLLOUT, _DECODER = "rollout.", "decoder."


def _live_tensors(engine: Engine) -> dict[str, Tensor]:
    named = {_ROLLOUT + name: tensor for name, tensor in engine.rollout.state.tensors().items()}
    return named | {_DECODER + name: tensor for name, tensor in engine.decoder_state.tensors().items()}


class Stream:
    """An endless video. Iterate it, or call ``next``; made by :meth:`echo_rt.Runtime.stream`.

    One block is generated at a time, whichever thread asks; ``set_prompt`` may be called from any thread meanwhile.
    Closing the stream, from inside the loop or from another thread, ends a running ``for`` loop after its block;
    ``next`` of a closed stream raises :class:`StreamError`, not ``StopIteration``: the video had no end.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine: Engine | None = engine
        self._noise = CounterNoise(seed)
        self._lock = threading.Lock()  # held while a block is made
        self._owner: int | None = None  # the thread that holds it
        self._prompt_lock = threading.Lock()
        self._pending: Tensor | None = None
        self._closed = False
        self._failure: str | None = None
        self._next_block = 0
        self._video_frames = 0

    # ---------------------------------------------------------------- life

    @classmethod
    def begin(cls, engine: Engine, prompt_embeds: Tensor, seed: int) -> Stream:
        """A new video in ``engine``'s buffers; the runtime makes sure that no other is live."""
        stream = cls(engine, seed)
        with model_context(engine.device, engine.dtype):
            engine.decoder_state.reset()
            engine.rollout.start(prompt_embeds)
            engine.settle()
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
        if snapshot.block < -1 or frames != snapshot.latents_decoded:
            raise StreamError(
                f"the snapshot contradicts itself: {snapshot.latents_decoded} latents decoded at block {snapshot.block}"
            )
        live = _live_tensors(engine)
        for name, tensor in live.items():
            saved = snapshot.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                came = "nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"
                raise StreamError(f"snapshot tensor {name}: expected {tensor.dtype} {tuple(tensor.shape)}, got {came}")
        with model_context(engine.device, engine.dtype):
            for name, tensor in live.items():
                tensor.copy_(snapshot.tensors[name])
            engine.settle()
        engine.rollout.state.block = snapshot.block
        engine.rollout.state.memory_ready = snapshot.memory_ready
        engine.decoder_state.latents_seen = snapshot.latents_decoded
        stream._pending = snapshot.pending_prompt
        stream._next_block = snapshot.block + 1
        stream._video_frames = engine.vae.video_frames(snapshot.latents_decoded)
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
        """The number of the block that comes next: 0 at the start."""
        return self._next_block

    @property
    def video_frames(self) -> int:
        """How many video frames have come so far."""
        return self._video_frames

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while (chunk := self._make_chunk()) is not None:
            yield chunk

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
            try:
                with model_context(engine.device, engine.dtype):
                    return self._generate(engine)
            except BaseException as error:
                # Half a block is in the buffers: this video is over, the runtime is not.
                self._failure = f"block {self._next_block} failed ({type(error).__name__}: {error})"
                raise

    def _generate(self, engine: Engine) -> Chunk:
        rollout, index = engine.rollout, self._next_block
        began = time.perf_counter()
        with self._prompt_lock:
            pending, self._pending = self._pending, None
        if pending is not None:
            rollout.switch_prompt(pending)
        made = rollout.next_block(self._noise)
        latents = made.to("cpu", copy=True)
        _require_finite(latents, f"block {index}: latent")
        generated = time.perf_counter()
        video = engine.decoder.decode(made, engine.decoder_state)
        finite = torch.isfinite(video).all()
        frames = torch.empty(video.shape, dtype=torch.uint8, device=video.device)
        engine.ops.frames_to_uint8(video, frames)
        frames = frames.cpu()
        if not bool(finite):
            _require_finite(video, f"block {index}: decoded video")
        decoded = time.perf_counter()
        position = rollout.position(index)
        stats = ChunkStats(
            generate_seconds=generated - began,
            decode_seconds=decoded - generated,
            newest_temporal_id=position.newest_temporal_id,
            shift=position.shift,
            memory_attended=rollout.memory_attended(index),
            vitals=_vitals(rollout, latents, video),
        )
        first_frame, self._video_frames = self._video_frames, self._video_frames + frames.shape[0]
        self._next_block = index + 1
        return Chunk(index=index, frames=frames, first_frame=first_frame, latents=latents, stats=stats)

    # ---------------------------------------------------------------- prompts

    def set_prompt(self, prompt: str | None = None, *, prompt_embeds: Tensor | None = None) -> None:
        """Switch to another prompt at the next block. The last call before a block counts. Any thread.

        Give ``prompt`` or ``prompt_embeds [length, text_dim]``, not both. :class:`PromptError` leaves the old prompt.
        """
        engine = self._engine
        if engine is None:
            raise StreamError("the stream is closed; start another with runtime.stream(...)")
        self._require_open()
        self._require_whole()
        embeds = engine.prompts.resolve(prompt, prompt_embeds)
        with self._prompt_lock:
            self._pending = embeds

    # ---------------------------------------------------------------- snapshot

    def snapshot(self) -> Snapshot:
        """Everything needed to go on bit for bit after the last whole block; waits for one that is being made."""
        self._require_open()
        with self._exclusive() as engine:
            if engine is None:
                raise StreamError("the stream was closed while a snapshot was waited for")
            self._require_whole()
            with self._prompt_lock:
                pending = self._pending
            state = engine.rollout.state
            with model_context(engine.device, engine.dtype):
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in _live_tensors(engine).items()}
            return Snapshot(
                model=dict(engine.model),
                seed=self._noise.seed,
                block=state.block,
                memory_ready=state.memory_ready,
                latents_decoded=engine.decoder_state.latents_seen,
                tensors=tensors,
                pending_prompt=pending,
            )


def _vitals(rollout: Rollout, latents: Tensor, video: Tensor) -> Vitals:
    low, high = torch.aminmax(video)
    memory = rollout.state.memory.float()
    return Vitals(
        latent_mean=float(latents.mean()),
        latent_std=float(latents.std()),
        latent_nonfinite=0,
        video_min=float(low),
        video_max=float(high),
        video_nonfinite=0,
        memory_norm=float(memory.square().mean().sqrt()) if rollout.state.memory_ready else None,
        gate_mean=None,
    )


def _require_finite(values: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NumericalError(f"{what}: {bad} of {values.numel()} values are NaN or infinite")
