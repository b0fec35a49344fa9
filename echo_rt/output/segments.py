"""A recording in numbered segments, each a whole file: a power cut costs at most the segment that is being written.

The folder holds ``video-00000.mp4``, ``video-00001.mp4``, ... (with ``latents-00000.safetensors``, ... where latents
are kept too), the list ``video.ffconcat`` that players and FFmpeg open as one video, and the index
``recording.json``, which says what belongs to the recording. A segment is entered there once it is on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.errors import ConfigError, OutputError, TargetError
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.segment_index import RecordingIndex, Segment
from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import Closing, close_all, reason, write_whole
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.wording import counted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

PLAYLIST_FILE = "video.ffconcat"
_VIDEO, _LATENTS = "video-", "latents-"
_PIECE = re.compile(r"video-\d{5,}\.mp4|latents-\d{5,}\.safetensors")


def check_free(
    folder: str | Path,
    expected: str = "a folder without a recording",
    advice: str = "resume it, or name another folder",
) -> None:
    """Raise ``TargetError`` where ``folder`` holds a recording with frames, or segments whose index is gone."""
    try:
        files = sorted(file.name for file in Path(folder).iterdir() if _PIECE.fullmatch(file.name))
    except FileNotFoundError:
        return
    except OSError as error:
        raise TargetError(f"{folder}: cannot be a folder to write into: {reason(error)}") from None
    frames = RecordingIndex.read(folder).frames if RecordingIndex.path(folder).exists() else None
    if frames or (frames is None and files):
        found = f"a recording of {counted(frames, 'frame')}" if frames else files[0]
        raise TargetError(f"{folder}: expected {expected}, found {found}; {advice}")


class SegmentedWriter(Closing):
    """Writes blocks of video to ``folder`` in segments of ``seconds`` of video, rounded up to whole blocks.

    Args:
        folder: made if absent; one that holds a recording with frames is refused.
        width, height, fps, crf, preset: as for :class:`VideoWriter`.
        seconds: of video in a segment, above 0; :meth:`cut` ends one earlier.
        latent_shape: channels, height and width of a latent frame, to keep the latents too.
        notes: plain JSON metadata for the index, for a resume; :attr:`notes` may be changed during the recording.

    Raises ``ConfigError`` for impossible sizes, ``TargetError`` for a folder that cannot be made or is taken, and
    ``OutputError`` when something cannot be written; everything that the index names is still whole then.
    """

    def __init__(
        self,
        folder: str | Path,
        width: int,
        height: int,
        fps: float | Fraction,
        *,
        seconds: float,
        latent_shape: Sequence[int] | None = None,
        notes: Mapping[str, Any] | None = None,
        crf: float = 18,
        preset: str = "veryfast",
    ) -> None:
        index = RecordingIndex(
            width=width,
            height=height,
            fps=Fraction(fps).limit_denominator(1001),
            latent_shape=None if latent_shape is None else tuple(latent_shape),
            notes=dict(notes or {}),
        )
        self._setup(folder, index, seconds, crf, preset)
        try:
            check_free(folder)
            self._sweep()
            self._publish()
        except BaseException:
            self._claim.release()
            raise

    @classmethod
    def resume(
        cls, folder: str | Path, at_frame: int, *, seconds: float, crf: float = 18, preset: str = "veryfast"
    ) -> SegmentedWriter:
        """Resume the recording in ``folder`` at frame ``at_frame`` and drop its frames from there on.

        A segment must begin or end there: where a snapshot was taken, :meth:`cut` ended one. ``TargetError`` where none
        does, and for an absent recording or one that lacks a file that its index names; then nothing is dropped.
        """
        writer = cls.__new__(cls)
        index = RecordingIndex.read(folder)
        writer._setup(folder, index, seconds, crf, preset)
        try:
            # Read again: from now on nobody else can change it.
            writer.index = index = RecordingIndex.read(folder)
            kept = [segment for segment in index.segments if segment.end_frame <= at_frame]
            reached = kept[-1].end_frame if kept else 0
            if reached != at_frame:
                raise TargetError(
                    f"{folder}: cannot resume at frame {at_frame}: the recording has {counted(index.frames, 'frame')}, "
                    f"and the last segment boundary before it is at frame {reached}"
                )
            index.check_files(folder, kept)
            index.segments = kept
            writer._publish()
            writer._sweep()
        except BaseException:
            writer._claim.release()
            raise
        return writer

    def _setup(self, folder: str | Path, index: RecordingIndex, seconds: float, crf: float, preset: str) -> None:
        if not seconds > 0:
            raise ConfigError(f"{folder}: a segment must have more than 0 seconds, got {seconds}")
        self.folder, self.index, self.seconds = Path(folder), index, seconds
        self._crf, self._preset = crf, preset
        self._video: VideoWriter | None = None
        self._latents: LatentsWriter | None = None
        self._closed = False
        self._claim = FolderClaim(folder)

    @property
    def playlist(self) -> Path:
        """Path of the list that plays the whole recording."""
        return self.folder / PLAYLIST_FILE

    @property
    def notes(self) -> dict[str, Any]:
        """The index's metadata; changes reach the disk with the next segment."""
        return self.index.notes

    @property
    def frames_on_disk(self) -> int:
        """Frames in whole segments."""
        return self.index.frames

    @property
    def latents_on_disk(self) -> int:
        """Latent frames in whole segments."""
        return sum(segment.latent_frames for segment in self.index.segments)

    def write(self, frames: ArrayLike, latents: ArrayLike | None = None) -> None:
        """Append one block: uint8 [T, H, W, 3], T of 1 or more, and its latents where the recording keeps them."""
        if self._closed:
            raise OutputError(f"{self.folder}: this writer is closed; nothing more can be written")
        if (latents is None) != (self.index.latent_shape is None):
            raise ConfigError(f"{self.folder}: expected {'no ' if latents is not None else ''}latents with a block")
        video = self._video or self._begin()
        # The latents first: the video can be decoded from them again.
        if self._latents is not None and latents is not None:
            self._latents.write(latents)
        video.write(frames)
        if video.frames_encoded >= self.seconds * self.index.fps:
            self.cut()

    def cut(self) -> None:
        """End the segment here, if it has frames: all frames written so far are on the disk afterwards."""
        video, latents, self._video, self._latents = self._video, self._latents, None, None
        if video is None:
            return
        problems = close_all(writer.close for writer in (latents, video) if writer is not None)
        # On a full disk, the frames that fitted still belong to the recording.
        if video.in_place and (latents is None or latents.in_place):
            problems += close_all([lambda: self._enter(video, latents)])
        if problems:
            raise problems[0]

    def _enter(self, video: VideoWriter, latents: LatentsWriter | None) -> None:
        try:
            segment = Segment(
                file=video.path.name,
                first_frame=self.index.frames,
                frames=video.frames_on_disk,
                size=video.path.stat().st_size,
                latents_file=None if latents is None else latents.path.name,
                latent_frames=0 if latents is None else latents.frames_on_disk,
                latents_size=0 if latents is None else latents.path.stat().st_size,
            )
        except OSError as error:
            raise OutputError(f"{video.path}: was written and cannot be found again: {reason(error)}") from None
        self.index.segments.append(segment)
        self._publish()

    def close(self) -> None:
        """End the last segment and release the folder. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.cut()
        finally:
            self._claim.release()

    def _begin(self) -> VideoWriter:
        index, number = self.index, len(self.index.segments)
        self._video = VideoWriter(
            self.folder / f"{_VIDEO}{number:05}.mp4",
            index.width,
            index.height,
            index.fps,
            crf=self._crf,
            preset=self._preset,
        )
        if index.latent_shape is not None:
            try:
                self._latents = LatentsWriter(self.folder / f"{_LATENTS}{number:05}.safetensors", index.latent_shape)
            except BaseException:
                self.cut()  # or a later block would go into a segment without latents, which the index refuses
                raise
        return self._video

    def _publish(self) -> None:
        """Write the index, which is decisive, and then the list."""
        self.index.write(self.folder)
        lines = ["ffconcat version 1.0"]
        for segment in self.index.segments:
            lines += [f"file {segment.file}", f"duration {float(segment.frames / self.index.fps):.6f}"]
        write_whole(self.playlist, "\n".join([*lines, ""]).encode())

    def _sweep(self) -> None:
        """Remove the files that do not belong to the recording (any more), and part files of killed processes."""
        named = {name for segment in self.index.segments for name in (segment.file, segment.latents_file)}
        try:
            for file in list(self.folder.iterdir()):
                if _PIECE.fullmatch(file.name) and file.name not in named:
                    file.unlink()
            for prefix in (_VIDEO, _LATENTS, PLAYLIST_FILE, RecordingIndex.path(self.folder).name):
                self._claim.remove_parts(prefix)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot remove unused files: {reason(error)}") from None
