"""What a stream hands out: blocks of video and their statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from echo_rt.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Vitals:
    """Statistics of a block's values, computed on the device, for a guard or a long run to watch.

    ``latent_*``: of the block's clean latents; ``video_*``: of the decoder's output, nominally in [-1, 1], before it is
    clamped to bytes. ``*_nonfinite`` count NaN and infinite values; where there are any, the others may be NaN too.
    ``memory_norm``: root mean square of the memory state; ``gate_mean``: share of the old state that the last memory
    update kept (0..1). These two are None without a memory, and before its first update.
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
    """How a block was made.

    ``generate_seconds``, ``decode_seconds``: time on the device, which may work on other blocks meanwhile; decoding
    includes the copy to the host. ``newest_temporal_id``: RoPE id of the block's last frame, which never exceeds the
    model's maximum; ``shift``: how far ids lie behind absolute frames. ``memory_attended``: whether the block's last
    pass attended to the memory (its first one may have come before the memory's first update).
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

    ``index``: number of the block, from 0. ``frames``: uint8 ``[T, height, width, 3]`` RGB on the host.
    ``first_frame``: number of the first of them in the whole video. ``latents``: float32 ``[frames_per_block, channels,
    h, w]`` on the host, normalized like the transformer's output.
    """

    index: int
    frames: Tensor = field(repr=False)
    first_frame: int
    latents: Tensor = field(repr=False)
    stats: ChunkStats

    def numpy(self) -> NDArray[np.uint8]:
        """The frames as an array ``[T, height, width, 3]``, which shares their memory."""
        return self.frames.numpy()

    def pil(self) -> list[Image]:
        """The frames as pictures of Pillow; :class:`BackendError` without that package."""
        try:
            from PIL.Image import fromarray
        except ImportError as error:
            raise BackendError(f"chunk.pil() needs the package pillow: {error} (pip install pillow)") from None
        return [fromarray(frame) for frame in self.numpy()]
