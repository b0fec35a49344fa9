"""One endless video: blocks in, chunks of frames out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.device import full_precision
from echo_rt.errors import NumericalError, PromptError, StreamError
from echo_rt.model.vae_decoder import VaeDecoder, VaeDecoderState
from echo_rt.noise import CounterNoise
from echo_rt.ops import Ops
from echo_rt.rollout import Rollout


@dataclass(frozen=True)
class ChunkStats:
    """How a block was made. Seconds are wall-clock, transfers to the host included.

    ``newest_temporal_id`` is the RoPE id of the block's last frame: it never exceeds the model's maximum.
    """

    generate_seconds: float
    decode_seconds: float
    newest_temporal_id: int
    shift: int
    memory_attended: bool


@dataclass(frozen=True)
class Chunk:
    """One block of video.

    ``index``: the block's number, from 0. ``frames``: uint8 ``[T, height, width, 3]`` RGB on the host.
    ``first_frame``: the number, in the whole video, of the first of them. ``latents``: float32
    ``[frames_per_block, channels, h, w]`` on the host, normalized as the transformer makes them.
    """

    index: int
    frames: Tensor
    first_frame: int
    latents: Tensor
    stats: ChunkStats


@dataclass(frozen=True)
class Snapshot:
    """Everything a stream needs to go on bit for bit, on the host. Made by :meth:`Stream.snapshot`.

    ``model`` describes the runtime it fits: a runtime that differs in any entry refuses it.
    """

    model: Mapping[str, Any]
    seed: int
    block: int
    memory_ready: bool
    latents_decoded: int
    tensors: Mapping[str, Tensor]
    pending_prompt: Tensor | None


@dataclass(frozen=True)
class Engine:
    """What a runtime lends to its stream."""

    device: torch.device
    dtype: torch.dtype
    rollout: Rollout
    decoder: VaeDecoder
    decoder_state: VaeDecoderState
    vae: VaeConfig
    ops: Ops
    model: Mapping[str, Any]
    encode: Callable[[str], Tensor]
    check_embeds: Callable[[Tensor], None]


_ROLLOUT, _DECODER = "rollout.", "decoder."


class Stream:
    """An endless video. Iterate it, or call ``next``; made by :meth:`echo_rt.Runtime.stream`.

    One block is generated at a time, whichever thread asks; ``set_prompt`` may be called from any thread meanwhile.
    Closing the stream, from inside the loop or from another thread, ends a running ``for`` loop after its block.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._noise = CounterNoise(seed)
        self._lock = threading.RLock()  # held while a block is made
        self._prompt_lock = threading.Lock()
        self._pending: Tensor | None = None
        self._closed = False
        self._failure: str | None = None

    # ---------------------------------------------------------------- life

    @classmethod
    def begin(cls, engine: Engine, prompt_embeds: Tensor, seed: int) -> Stream:
        """A new video in ``engine``'s buffers; the runtime makes sure that no other is live."""
        stream = cls(engine, seed)
        engine.decoder_state.reset()
        with torch.no_grad():
            engine.rollout.start(prompt_embeds)
        return stream

    @classmethod
    def restore(cls, engine: Engine, snapshot: Snapshot) -> Stream:
        """The video of ``snapshot``, at the block it was taken at; :class:`StreamError` if it is another model's."""
        different = sorted(k for k in {*engine.model, *snapshot.model} if engine.model.get(k) != snapshot.model.get(k))
        if different:
            key = different[0]
            raise StreamError(
                f"the snapshot is of another model: {key} is {snapshot.model.get(key)!r} in the snapshot and "
                f"{engine.model.get(key)!r} here ({len(different)} differences: {', '.join(different)})"
            )
        stream = cls(engine, snapshot.seed)
        live = stream._live_tensors()
        for name, tensor in live.items():
            saved = snapshot.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                came = "nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"
                raise StreamError(f"snapshot tensor {name}: expected {tensor.dtype} {tuple(tensor.shape)}, got {came}")
        for name, tensor in live.items():
            tensor.copy_(snapshot.tensors[name])
        engine.rollout.state.block = snapshot.block
        engine.rollout.state.memory_ready = snapshot.memory_ready
        engine.decoder_state.latents_seen = snapshot.latents_decoded
        stream._pending = snapshot.pending_prompt
        return stream

    def close(self) -> None:
        """End the video; waits for a block that is being made. Its runtime can then start another. Idempotent."""
        self._closed = True
        with self._lock:
            pass

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- video

    @property
    def next_block(self) -> int:
        """The number of the block that comes next: 0 at the start."""
        return self._engine.rollout.state.block + 1

    @property
    def video_frames(self) -> int:
        """How many video frames have come so far."""
        return self._engine.vae.video_frames(self._engine.decoder_state.latents_seen)

    def __iter__(self) -> Iterator[Chunk]:
        self._require_open()
        while not self._closed:
            chunk = self._make_chunk()
            if chunk is None:
                return
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

    def _make_chunk(self) -> Chunk | None:
        with self._lock, torch.no_grad(), full_precision(self._engine.device, self._engine.dtype):
            if self._closed:
                return None
            if self._failure is not None:
                raise StreamError(f"the stream cannot go on: {self._failure}; start or resume another")
            block = self.next_block
            try:
                return self._generate()
            except BaseException as error:
                # Half a block is in the buffers: this video is over, the runtime is not.
                self._failure = f"block {block} failed ({type(error).__name__}: {error})"
                raise

    def _generate(self) -> Chunk:
        engine, rollout = self._engine, self._engine.rollout
        began = time.perf_counter()
        with self._prompt_lock:
            pending, self._pending = self._pending, None
        if pending is not None:
            rollout.switch_prompt(pending)
        index, first_frame = self.next_block, self.video_frames
        made = rollout.next_block(self._noise)
        latents = made.to("cpu", copy=True)
        if not bool(torch.isfinite(latents).all()):
            bad = int((~torch.isfinite(latents)).sum())
            raise NumericalError(f"block {index}: {bad} of {latents.numel()} latent values are NaN or infinite")
        generated = time.perf_counter()
        video = engine.decoder.decode(made, engine.decoder_state)
        frames = torch.empty(video.shape, dtype=torch.uint8, device=video.device)
        engine.ops.frames_to_uint8(video, frames)
        frames = frames.cpu()
        decoded = time.perf_counter()
        position = rollout.position(index)
        stats = ChunkStats(
            generate_seconds=generated - began,
            decode_seconds=decoded - generated,
            newest_temporal_id=position.newest_temporal_id,
            shift=position.shift,
            memory_attended=rollout.memory_attended(index),
        )
        return Chunk(index=index, frames=frames, first_frame=first_frame, latents=latents, stats=stats)

    # ---------------------------------------------------------------- prompts

    def set_prompt(self, prompt: str | None = None, *, prompt_embeds: Tensor | None = None) -> None:
        """Switch to another prompt at the next block. The last call before a block counts. Any thread.

        Give ``prompt`` or ``prompt_embeds [length, text_dim]``, not both. :class:`PromptError` leaves the old prompt.
        """
        self._require_open()
        embeds = resolve_prompt(self._engine, prompt, prompt_embeds)
        with self._prompt_lock:
            self._pending = embeds

    # ---------------------------------------------------------------- snapshot

    def _live_tensors(self) -> dict[str, Tensor]:
        engine = self._engine
        named = {_ROLLOUT + name: tensor for name, tensor in engine.rollout.state.tensors().items()}
        return named | {_DECODER + name: tensor for name, tensor in engine.decoder_state.tensors().items()}

    def snapshot(self) -> Snapshot:
        """Everything needed to go on bit for bit after the last whole block; waits for one that is being made."""
        with self._lock:
            self._require_open()
            if self._failure is not None:
                raise StreamError(f"nothing whole to snapshot: {self._failure}")
            with self._prompt_lock:
                pending = self._pending
            state = self._engine.rollout.state
            return Snapshot(
                model=dict(self._engine.model),
                seed=self._noise.seed,
                block=state.block,
                memory_ready=state.memory_ready,
                latents_decoded=self._engine.decoder_state.latents_seen,
                tensors={name: t.to("cpu", copy=True) for name, t in self._live_tensors().items()},
                pending_prompt=pending,
            )


def resolve_prompt(engine: Engine, prompt: str | None, prompt_embeds: Tensor | None) -> Tensor:
    """The embeddings of a prompt given as text or as embeddings; :class:`PromptError` for both, neither or bad ones."""
    if (prompt is None) == (prompt_embeds is None):
        came = "neither" if prompt is None else "both"
        raise PromptError(f"give a prompt or prompt_embeds, one of the two; got {came}")
    if prompt_embeds is None:
        assert prompt is not None
        return engine.encode(prompt)
    engine.check_embeds(prompt_embeds)
    return prompt_embeds.detach().clone()
