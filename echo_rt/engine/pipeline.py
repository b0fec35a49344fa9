"""From latents to frames on the host: the decoder works on one block while the transformer makes the next.

A block is begun (its work is submitted to the queues of :mod:`echo_rt.engine.executor`) and later finished (waited
for). In between it is in flight and occupies a slot of host memory, pinned on a GPU. The number of slots is fixed, so
memory does not grow however slow the consumer is.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.executor import Event, Executor, Queue
from echo_rt.engine.rollout import Rollout
from echo_rt.engine.state import VITALS
from echo_rt.model.decoder_protocol import DecoderState, VideoDecoder
from echo_rt.ops.schema import Ops

_VIDEO_VITALS = ("video_min", "video_max", "video_nonfinite")  # in the order of Pipeline._decode


def frames_shape(config: ModelConfig, vae: VaeConfig) -> tuple[int, int, int, int]:
    """Shape of a block's frames, ``[frames, height, width, 3]``; the first block of a video has fewer frames."""
    frames = vae.video_frames(1 + config.window.frames_per_block) - vae.video_frames(1)
    return frames, config.latent_height * vae.spatial_stride, config.latent_width * vae.spatial_stride, 3


class _Slot:
    """Host memory of one block in flight, and what the host knows about the block when it begins.

    ``count``: number of its frames; ``stats``: the entries of its :class:`ChunkStats` that are known; ``unknown``: the
    vitals that it does not have.
    """

    def __init__(self, frames: Tensor, latents: Tensor, vitals: Tensor) -> None:
        def host(like: Tensor) -> Tensor:
            return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

        self.frames, self.latents, self.vitals = host(frames), host(latents), host(vitals)
        self.begun: Event | None = None
        self.made: Event | None = None
        self.arrived: Event | None = None
        self.index = self.first_frame = self.count = 0
        self.stats: dict[str, Any] = {}
        self.unknown: list[str] = []

    def read(self) -> Chunk:
        """Copy the block that has arrived out of the slot."""
        assert self.begun is not None and self.made is not None and self.arrived is not None
        values: dict[str, Any] = dict(zip((*VITALS, *_VIDEO_VITALS), self.vitals.tolist(), strict=True))
        values |= {name: int(values[name]) for name in ("latent_nonfinite", "video_nonfinite")}
        values |= dict.fromkeys(self.unknown)
        generated, decoded = self.made.seconds_since(self.begun), self.arrived.seconds_since(self.made)
        stats = ChunkStats(generated, decoded, vitals=Vitals(**values), **self.stats)
        return Chunk(self.index, self.frames[: self.count].clone(), self.first_frame, self.latents.clone(), stats)


class Pipeline:
    """Owns the decoder's state and the buffers between device and host, for one rollout.

    ``depth``: how many blocks may be in flight. ``given``: latents ``[B, C, h, w]``, on the host, of the next blocks,
    which are not generated.
    """

    def __init__(
        self,
        rollout: Rollout,
        decoder: VideoDecoder[Any],
        vae: VaeConfig,
        ops: Ops,
        executor: Executor,
        *,
        device: torch.device,
        depth: int,
    ) -> None:
        self.rollout, self.depth = rollout, depth
        self._decoder, self._vae, self._ops, self._executor = decoder, vae, ops, executor
        config = rollout.config
        block = config.window.frames_per_block
        self.decoder_state: DecoderState = decoder.new_state(config.latent_height, config.latent_width, block)
        self._latents = torch.empty_like(rollout.state.x)
        self._frames = torch.empty(frames_shape(config, vae), dtype=torch.uint8, device=device)
        self._vitals = torch.zeros(len(VITALS) + len(_VIDEO_VITALS), dtype=torch.float32, device=device)
        self._slots = [_Slot(self._frames, self._latents, self._vitals) for _ in range(depth)]
        self.given: deque[Tensor] = deque()
        self._flying: deque[_Slot] = deque()
        self._last_arrival: Event | None = None

    @property
    def in_flight(self) -> int:
        """Blocks begun and not finished."""
        return len(self._flying)

    @property
    def decoder_bytes(self) -> int:
        """Device memory, in bytes, of the decoder's history and scratch buffers."""
        return self.decoder_state.nbytes

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that outlives a block, by name: of the rollout, of the decoder, and between them."""
        state = self.rollout.state
        owners: dict[str, object] = {"state": state, "rope": state.rope, "pipeline": self}
        owners |= {f"slot {number}": slot for number, slot in enumerate(self._slots)}
        found = {
            f"{owner}.{name}": value
            for owner, holder in owners.items()
            for name, value in vars(holder).items()
            if isinstance(value, Tensor)
        }
        return found | {f"decoder {name}": tensor for name, tensor in self.decoder_state.buffers().items()}

    def live_tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next block depends on, by its name in snapshots; the live tensors, not copies."""
        named = {f"rollout.{name}": tensor for name, tensor in self.rollout.state.tensors().items()}
        return named | {f"decoder.{name}": tensor for name, tensor in self.decoder_state.tensors().items()}

    def reset(self) -> None:
        """Drop the blocks in flight and go back to the start of a stream."""
        self._executor.synchronize()
        self.given.clear()
        self._flying.clear()
        self._last_arrival = None
        with self._executor.eager():  # in the queue that loads a state
            self.decoder_state.reset()

    def begin(self, index: int | None = None, noise: Tensor | None = None) -> None:
        """Submit the next block's work to a free slot, of which there must be one.

        ``index``: the block's number, None for the state's. ``noise``: in place of the seed's, see ``next_block``.
        """
        assert len(self._flying) < self.depth
        executor, rollout, video_frames = self._executor, self.rollout, self._vae.video_frames
        state, layout = rollout.state, rollout.state.layout
        block, count = state.block + 1, len(self._latents)
        slot = self._slots[block % self.depth]
        slot.begun = executor.record(Queue.MAIN, slot.begun)
        if self.given:
            rollout.given_block(self.given.popleft())
        else:
            rollout.next_block(noise)
        slot.made = executor.record(Queue.MAIN, slot.made)
        # There is one buffer between transformer and decoder: it must be free of the block before.
        handed = executor.run(self._hand_over, after=[self._last_arrival])
        executor.run(self._decode, block == 0, queue=Queue.DECODE, after=[handed])
        slot.count = video_frames((block + 1) * count) - video_frames(block * count)
        with executor.eager(Queue.DECODE):
            slot.frames[: slot.count].copy_(self._frames[: slot.count], non_blocking=True)
            slot.latents.copy_(self._latents, non_blocking=True)
            slot.vitals.copy_(self._vitals, non_blocking=True)
        slot.arrived = self._last_arrival = executor.record(Queue.DECODE, slot.arrived)
        slot.index = block if index is None else index
        slot.first_frame = video_frames(slot.index * count)
        slot.stats = {
            "newest_temporal_id": layout.temporal_id(block, layout.last_frame(block)),
            "shift": layout.shift(block),
            "memory_attended": rollout.memory_attended(block),
        }
        known = {"memory_norm": state.memory_ready, "gate_mean": state.memory_updated}
        slot.unknown = [name for name, there in known.items() if not there]
        self._flying.append(slot)

    def finish(self, seconds: float | None = None) -> Chunk | None:
        """Wait for the oldest block in flight, copy it and free its slot; None if it is not there after ``seconds``."""
        slot = self._flying[0]
        assert slot.arrived is not None
        if not slot.arrived.wait(seconds):
            return None
        chunk = slot.read()
        self._flying.popleft()
        return chunk

    # ---------------------------------------------------------------- stages

    def _hand_over(self) -> None:
        state = self.rollout.state
        self._latents.copy_(state.x)
        self._vitals[: len(VITALS)].copy_(state.vitals)

    def _decode(self, is_start: bool) -> None:
        video = self._decoder.decode_next(self._latents, self.decoder_state, is_start=is_start)
        self._ops.frames_to_uint8(video, self._frames[: len(video)])
        figures = (*torch.aminmax(video), _nonfinite(video))
        for at, figure in enumerate(figures, len(VITALS)):
            self._vitals[at] = figure


def _nonfinite(video: Tensor) -> Tensor:
    # A number minus itself is 0, of infinity and NaN it is NaN. Frame by frame it all happens in a CPU's caches.
    parts = video if video.is_cpu else [video]
    return torch.stack([(part - part).count_nonzero() for part in parts]).sum()
