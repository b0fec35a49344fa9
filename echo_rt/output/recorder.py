"""Recording a stream: its blocks into one video or segments of one, and snapshots to resume from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from echo_rt.output.contact_sheet import ContactSheet
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.segments import SegmentedWriter
from echo_rt.output.video import VideoWriter
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper
from echo_rt.utils.atomic_file import Closing, close_all

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.chunk import Chunk
    from echo_rt.stream import Stream

SNAPSHOT_FOLDER = "snapshots"
_Self = TypeVar("_Self", bound="_BlockRecorder")


class _BlockRecorder(ABC):
    """Records blocks until the video has ``frame_limit`` frames, including earlier ones; None for no end.

    ``with`` closes it and raises the first error of closing, unless another error ends the ``with``.
    """

    def __init__(self, frames: int, frame_limit: int | None) -> None:
        self.frames = frames
        self.frame_limit = frame_limit

    @property
    def full(self) -> bool:
        """Whether the video has all its frames."""
        return self.frame_limit is not None and self.frames >= self.frame_limit

    def write(self, chunk: Chunk) -> None:
        """Record one block: its frames up to the limit, its latents whole."""
        frames = chunk.frames
        if self.frame_limit is not None:
            frames = frames[: self.frame_limit - self.frames]
        self._write(frames, chunk.latents)
        self.frames += len(frames)

    @abstractmethod
    def _write(self, frames: Tensor, latents: Tensor) -> None: ...

    @abstractmethod
    def close(self) -> list[Exception]:
        """Put all files in place, whatever happens to the others, and return the errors."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Describe what is on the disk after :meth:`close`, in plain JSON types."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        problems = self.close()
        if problems and error is None:
            raise problems[0]


class Recorder(_BlockRecorder):
    """Records the video in one file and, on request, its latents and its contact sheet.

    Args:
        video, latents, contact_sheet: files; None for no such file.
        frame_size: width and height in pixels.
        fps: frames per second.
        latent_shape: channels, height and width of a latent frame; needed for ``latents`` only.
        frame_limit: frames after which the video ends, even in the middle of a block; None for no end.
        metadata: for the header of the latents' file.
    """

    def __init__(
        self,
        video: str | Path,
        latents: str | Path | None = None,
        contact_sheet: str | Path | None = None,
        *,
        frame_size: tuple[int, int],
        fps: float,
        latent_shape: tuple[int, int, int] | None = None,
        frame_limit: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(0, frame_limit)
        self._writers: list[Closing] = []
        self._latents: LatentsWriter | None = None
        self._sheet: ContactSheet | None = None
        try:
            self._video = VideoWriter(video, *frame_size, fps)
            self._writers.append(self._video)
            if latents is not None:
                self._latents = LatentsWriter(latents, latent_shape or (), metadata=metadata)
                self._writers.append(self._latents)
            if contact_sheet is not None:
                self._sheet = ContactSheet(contact_sheet, fps=fps)
                self._writers.append(self._sheet)
        except BaseException:
            self.close()
            raise

    def _write(self, frames: Tensor, latents: Tensor) -> None:
        # The latents first: the video can be decoded from them again.
        if self._latents is not None:
            self._latents.write(latents)
        if self._sheet is not None:
            self._sheet.write(frames)
        self._video.write(frames)

    def close(self) -> list[Exception]:
        return close_all(writer.close for writer in self._writers)

    def report(self) -> dict[str, Any]:
        named = (("video", self._video), ("latents", self._latents), ("contact_sheet", self._sheet))
        frames = self._video.frames_on_disk if self._video.in_place else 0
        return {
            "frames": frames,
            "seconds": float(frames / self._video.fps),
            "size": [self._video.width, self._video.height],
            "video_fps": float(self._video.fps),
            "latent_frames": self._latents.frames_on_disk if self._latents and self._latents.in_place else 0,
            "files": {name: str(file.path) for name, file in named if file is not None and file.in_place},
        }


class SegmentRecorder(_BlockRecorder):
    """Records the video in segments.

    Args:
        writer: writes the segments; closed with the recorder.
        first_frame: number of frames that the recording already has.
        frame_limit: frames after which the video ends, including these; None for no end.
    """

    def __init__(self, writer: SegmentedWriter, *, first_frame: int = 0, frame_limit: int | None = None) -> None:
        super().__init__(first_frame, frame_limit)
        self.writer = writer

    def _write(self, frames: Tensor, latents: Tensor) -> None:
        self.writer.write(frames, None if self.writer.index.latent_shape is None else latents)

    def close(self) -> list[Exception]:
        return close_all([self.writer.close])

    def report(self) -> dict[str, Any]:
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
    """Takes a snapshot every few blocks, once the recording up to it is on the disk.

    So after a kill the recording has every frame before any snapshot, and a segment ends there.

    Args:
        folder: of the recording.
        writer: of the recording.
        every: blocks between two snapshots.
        resumed_at: block of the snapshot that the video resumed from; None for a new video.
    """

    def __init__(self, folder: Path, writer: SegmentedWriter, every: int, *, resumed_at: int | None) -> None:
        self._writer, self._every, self._last = writer, every, resumed_at
        self._keeper = SnapshotKeeper(folder / SNAPSHOT_FOLDER)

    def before_block(self, stream: Stream) -> None:
        """Take a snapshot if one is due, and wait for the first: from then on there is always one to resume from."""
        first = self._last is None
        if first or (stream.next_block % self._every == 0 and stream.next_block != self._last):
            self._offer(stream)
            if first:
                self._keeper.wait()

    def after_last_block(self, stream: Stream) -> None:
        """Take a snapshot of the end of a video, which can be continued."""
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
        """Wait for the snapshot that is being written, and return the errors."""
        return close_all([self._keeper.close])

    def report(self) -> dict[str, int]:
        """Number of snapshots written, and skipped because another was still being written."""
        return {"written": self._keeper.written, "skipped": self._keeper.skipped}
