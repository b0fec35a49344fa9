"""The compiled part of echo-rt. All positions count latent frames from the start of the video (64 bit)."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    """Version of echo-rt that was compiled."""
    compiler: str
    """Name and version of the C++ compiler."""
    cxx_standard: int
    """C++ standard, 17 for C++17."""
    cuda_archs: tuple[str, ...]
    """GPU architectures whose kernels are inside, e.g. ("80", "90a"); empty for a build without CUDA."""

def build_info() -> BuildInfo:
    """How this extension was compiled."""

class RingLayout:
    """Slots, evictions and temporal ids of the KV buffer, whose order is memory | sink | local ring.

    The sink is the first ``sink_frames`` of the video; every later frame goes round the ring. Methods that take a
    ``block`` raise ``ValueError`` for one that is negative or too large for 64 bits.
    """

    def __init__(
        self,
        *,
        frames_per_block: int,
        sink_frames: int,
        local_frames: int,
        memory_frames: int,
        max_temporal_id: int,
    ) -> None:
        """Raises ``ValueError`` for a window that the model cannot have (memory_frames 0 means no memory)."""

    @property
    def frames_per_block(self) -> int: ...
    @property
    def sink_frames(self) -> int: ...
    @property
    def local_frames(self) -> int: ...
    @property
    def memory_frames(self) -> int: ...
    @property
    def max_temporal_id(self) -> int: ...
    @property
    def slots(self) -> int:
        """All slots of the buffer: memory_frames + sink_frames + local_frames."""

    def first_frame(self, block: int) -> int:
        """First absolute frame of a block."""

    def last_frame(self, block: int) -> int:
        """Last absolute frame of a block, inclusive."""

    def is_sink_block(self, block: int) -> bool:
        """Whether the block's frames belong to the sink."""

    def slot(self, frame: int) -> int:
        """The slot that an absolute frame is written to, in ``memory_frames .. slots - 1``."""

    def evicts(self, block: int) -> bool:
        """Whether writing this block overwrites a block that was in the ring."""

    def evicted_frame(self, block: int) -> int:
        """First of the frames that this block overwrites, at ``slot(first_frame(block))``; valid where it evicts."""

    def oldest_local(self, block: int) -> int:
        """Oldest absolute frame in the ring once this block is written; ``sink_frames`` while the ring is empty."""

    def local_filled(self, block: int) -> int:
        """Frames in the ring once this block is written, ``0 .. local_frames``."""

    def attended_begin(self, memory_active: bool) -> int:
        """First attended slot: 0 with the memory, else the sink's first."""

    def attended_end(self, block: int) -> int:
        """One past the last slot that this block, itself included, attends to."""

    def shift(self, block: int) -> int:
        """How far the window has moved past the trained ids: ``max(0, last_frame - max_temporal_id)``."""

    def temporal_id(self, block: int, frame: int) -> int:
        """Id of a local, memory or query frame while this block is generated; a sink frame's id is its own number."""

    def memory_frame(self, block: int) -> int:
        """Absolute frame whose angle the first memory frame takes, ``memory_frames`` before the oldest local one."""

    def memory_fits(self, block: int) -> bool:
        """Whether there is a memory and its ids keep clear of the sink's."""
