"""What a stream hands out: a block of video, and the figures that say how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Vitals:
    """Statistics of one block, formed on the device beside it: what a guard or a long run watches.

    ``latent_*``: of the block's clean latents; ``video_*``: of the decoder's output, nominally in [-1, 1], before it
    is clamped to bytes. ``*_nonfinite`` count NaN and infinite values; where there are any, the other figures may be
    NaN too. ``memory_norm``: root mean square of the memory state, ``gate_mean``: how much of the old state the last
    memory update kept (0..1); None where there is no memory, or no update yet.
    """

    latent_mean: float
    latent_std: float
    latent_nonfinite: int
    video_min: float
    video_max: float
    video_nonfinite: int
    memory_norm: float | None
    gate_mean: float | None


@dataclass(frozen=True)
class ChunkStats:
    """How a block was made. Seconds are the device's, which may have other blocks too; decoding ends on the host.

    ``newest_temporal_id`` is the RoPE id of the block's last frame: it never exceeds the model's maximum.
    ``memory_attended``: whether the block's last pass attended to the memory (its first may have come too early).
    """

    generate_seconds: float
    decode_seconds: float
    newest_temporal_id: int
    shift: int
    memory_attended: bool
    vitals: Vitals


@dataclass(frozen=True, eq=False)
class Chunk:
    """One block of video.

    ``index``: the block's number, from 0. ``frames``: uint8 ``[T, height, width, 3]`` RGB on the host.
    ``first_frame``: the number, in the whole video, of the first of them. ``latents``: float32
    ``[frames_per_block, channels, h, w]`` on the host, normalized as the transformer makes them.
    """

    index: int
    frames: Tensor = field(repr=False)
    first_frame: int
    latents: Tensor = field(repr=False)
    stats: ChunkStats
