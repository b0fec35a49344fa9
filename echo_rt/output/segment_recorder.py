"""What ``generate --segments`` writes while it runs: pieces of video, and the snapshots to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.output.segments import SegmentedWriter
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper

if TYPE_CHECKING:
    from echo_rt.chunk import Chunk
    from echo_rt.stream import Stream

SNAPSHOT_FOLDER = "snapshots"


class SegmentRecorder:
    """The same to its user as a :class:`Recorder`, over a ``writer`` that may have frames already.

    Args:
        writer: what it writes to, and closes.
        first_frame: how many frames are there already.
        frame_limit: frames after which the video ends, those that are there included; None for no end.
    """

    def __init__(self, writer: SegmentedWriter, *, first_frame: int, frame_limit: int | None) -> None:
        self.writer = writer
        self.frame_limit = frame_limit
        self.frames = first_frame

    @property
    def full(self) -> bool:
        """Whether the video has all its frames."""
        return self.frame_limit is not None and self.frames >= self.frame_limit

    def write(self, chunk: Chunk) -> None:
        """Record one block: its frames up to the limit, its latents whole."""
        frames = chunk.frames
        if self.frame_limit is not None:
            frames = frames[: self.frame_limit - self.frames]
        self.writer.write(frames, None if self.writer.index.latent_shape is None else chunk.latents)
        self.frames += len(frames)

    def close(self) -> list[Exception]:
        """End the last segment and return what went wrong."""
        try:
            self.writer.close()
        except Exception as error:  # of whatever kind: it is told beside what ended the video
            return [error]
        return []

    def report(self) -> dict[str, Any]:
        """What is on the disk after :meth:`close`, in plain JSON types."""
        writer = self.writer
        frames, index = writer.frames_on_disk, writer.index
        return {
            "frames": frames,
            "seconds": float(frames / index.fps),
            "size": [index.width, index.height],
            "video_fps": float(index.fps),
            "latent_frames": writer.latents_on_disk,
            "segments": len(index.segments),
            "files": {"video": str(writer.playlist)} if frames else {},
        }


class Checkpoints:
    """Snapshots every so many blocks, each after the recording up to it has reached the disk.

    So whichever snapshot is found after a kill, the recording has every frame before it, and a segment ends there.

    Args:
        folder: of the recording.
        writer: the recording.
        every: blocks between two snapshots.
        resumed_at: the block that the newest snapshot was found at; None for a new video.
    """

    def __init__(self, folder: Path, writer: SegmentedWriter, every: int, *, resumed_at: int | None) -> None:
        self._writer, self._every, self._last = writer, every, resumed_at
        self._keeper = SnapshotKeeper(folder / SNAPSHOT_FOLDER)

    def before_block(self, stream: Stream) -> None:
        """Take one where it is time; the first of all is waited for, so that there is always one to go on from."""
        if stream.next_block % self._every == 0 and stream.next_block != self._last:
            self._offer(stream)
            if stream.next_block == 0:
                self._keeper.wait()

    def after_last_block(self, stream: Stream) -> None:
        """Take one of the end of a video that can be gone on with."""
        if stream.next_block != self._last:
            self._keeper.wait()
            self._offer(stream)

    def _offer(self, stream: Stream) -> None:
        def take() -> Snapshot:
            self._writer.cut()
            return stream.snapshot()

        if self._keeper.offer(take):
            self._last = stream.next_block

    def close(self) -> list[Exception]:
        """Wait for what is being written and return what went wrong."""
        try:
            self._keeper.close()
        except Exception as error:
            return [error]
        return []

    def report(self) -> dict[str, int]:
        """How many snapshots were written, and how many were left out because one was being written."""
        return {"written": self._keeper.written, "skipped": self._keeper.skipped}
