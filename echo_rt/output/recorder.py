"""Recording a stream: its blocks into one video or segments of one, and snapshots to resume from."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.contact_sheet import ContactSheet
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.segments import SegmentedWriter
from echo_rt.output.video import VideoWriter
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper
from echo_rt.utils.atomic_file import Closing, close_all
from echo_rt.utils.wording import type_of

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.chunk import Chunk
    from echo_rt.stream import Stream

SNAPSHOT_FOLDER = "snapshots"
_AHEAD = 4  # blocks that wait to be encoded: 3 s of video, 57 MB at 832x480


class _BlockRecorder(Closing):
    """Records blocks until the video has ``frame_limit`` frames, including earlier ones; None for no end.

    They are encoded and written on a thread, so that a stream goes on meanwhile, until a few blocks wait there.
    ``held_up``: seconds that :meth:`write` has waited for it. An error of the thread is raised once, by the next
    :meth:`write` that follows it, :meth:`drain` or :meth:`close`.

    ``with`` closes it and raises the first error of closing, unless another error ends the ``with``.
    """

    def __init__(self, frames: int, frame_limit: int | None) -> None:
        self.frames = frames
        self.frame_limit = frame_limit
        self.held_up = 0.0
        self._thread = ThreadPoolExecutor(1, "echo-rt recorder")
        self._waiting: deque[Future[None]] = deque()
        self._writers: dict[str, Any] = {}  # by the names of their files in the report

    @property
    def full(self) -> bool:
        """Whether the video has all its frames."""
        return self.frame_limit is not None and self.frames >= self.frame_limit

    def write(self, chunk: Chunk, prompt: str | None = None) -> None:
        """Record one block: its frames up to the limit, its latents whole; a contact sheet shows the ``prompt``."""
        if not hasattr(chunk, "latents"):
            raise ConfigError(f"expected a chunk of a stream to record, got {type_of(chunk)}")
        begun = time.monotonic()
        self._settle(_AHEAD - 1)
        self.held_up += time.monotonic() - begun
        frames = chunk.frames
        if self.frame_limit is not None:
            frames = frames[: self.frame_limit - self.frames]
        try:
            self._waiting.append(self._thread.submit(self._write, frames, chunk.latents, prompt))
        except RuntimeError:
            raise OutputError("this recorder is closed; nothing more can be written") from None
        self.frames += len(frames)

    def drain(self) -> None:
        """Wait until all blocks are encoded; raises the thread's error."""
        self._settle(0)

    def _settle(self, most: int) -> None:
        """Wait until at most ``most`` blocks are left, and raise the first error; later ones only follow from it."""
        try:
            while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
                self._waiting.popleft().result()
        except Exception:
            while self._waiting:
                self._waiting.pop().cancel()
            raise

    def close(self) -> list[Exception]:
        """Put all files in place, whatever happens to the others, and return the errors."""
        return close_all([self.drain, self._thread.shutdown, *(one.close for one in self._writers.values())])

    @abstractmethod
    def _write(self, frames: Tensor, latents: Tensor, prompt: str | None) -> None: ...

    def report(self) -> dict[str, Any]:
        """Describe what is on the disk after :meth:`close`, in plain JSON types."""
        return {"held_up_seconds": round(self.held_up, 3)}

    def __exit__(self, *error: object) -> None:
        problems = self.close()
        if problems and error[0] is None:
            raise problems[0]


class Recorder(_BlockRecorder):
    """Records the video in one file and, on request, its latents and its contact sheet; existing files are replaced.

    Args:
        video, latents, contact_sheet: files whose names end in ``.mp4``, ``.safetensors`` and ``.png``; None for no
            such file.
        frame_size: width and height in pixels.
        fps: frames per second.
        latent_shape: channels, height and width of a latent frame; needed for ``latents`` only.
        frame_limit: frames after which the video ends, even in the middle of a block; None for no end.
        metadata: for the header of the latents' file.
        codec, crf, preset, fragmented: as for :class:`VideoWriter`.
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
        codec: str = "h264",
        crf: float | None = None,
        preset: str | None = None,
        fragmented: bool = False,
    ) -> None:
        super().__init__(0, frame_limit)
        self._latents: LatentsWriter | None = None
        self._sheet: ContactSheet | None = None
        self._video = VideoWriter(video, *frame_size, fps, codec=codec, crf=crf, preset=preset, fragmented=fragmented)
        self._writers["video"] = self._video
        try:
            if latents is not None:
                self._latents = self._writers["latents"] = LatentsWriter(latents, latent_shape or (), metadata=metadata)
            if contact_sheet is not None:
                self._sheet = self._writers["contact_sheet"] = ContactSheet(contact_sheet, fps=fps)
        except BaseException:
            self.close()
            raise

    def _write(self, frames: Tensor, latents: Tensor, prompt: str | None) -> None:
        # The latents first: the video can be decoded from them again.
        if self._latents is not None:
            self._latents.write(latents)
        if self._sheet is not None:
            self._sheet.write(frames, prompt)
        self._video.write(frames)

    def report(self) -> dict[str, Any]:
        frames = self._video.frames_on_disk if self._video.in_place else 0
        return super().report() | {
            "frames": frames,
            "seconds": float(frames / self._video.fps),
            "size": [self._video.width, self._video.height],
            "video_fps": float(self._video.fps),
            "latent_frames": self._latents.frames_on_disk if self._latents and self._latents.in_place else 0,
            "files": {name: str(one.path) for name, one in self._writers.items() if one.in_place},
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
        self.writer = self._writers["video"] = writer

    def _write(self, frames: Tensor, latents: Tensor, prompt: str | None) -> None:
        self.writer.write(frames, None if self.writer.index.latent_shape is None else latents)

    def cut(self) -> None:
        """End the segment here, as :meth:`SegmentedWriter.cut` does."""
        self.drain()
        self.writer.cut()

    def report(self) -> dict[str, Any]:
        writer = self.writer
        frames, index = writer.frames_on_disk, writer.index
        return super().report() | {
            "frames": frames,
            "seconds": float(frames / index.frame_rate),
            "size": [index.width, index.height],
            "video_fps": float(index.frame_rate),
            "latent_frames": writer.latents_on_disk,
            "segments": writer.segments_on_disk,
            "files": {"video": str(writer.playlist)} if frames else {},
        }


class Checkpoints:
    """Takes a snapshot every few blocks, once the recording up to it is on the disk.

    So after a kill the recording has every frame before any snapshot, and a segment ends there.

    Args:
        folder: of the recording.
        writer: of the recording, or its recorder.
        every: blocks between two snapshots.
        resumed_at: block of the snapshot that the video resumed from; None for a new video.
    """

    def __init__(
        self, folder: Path, writer: SegmentRecorder | SegmentedWriter, every: int, *, resumed_at: int | None
    ) -> None:
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
