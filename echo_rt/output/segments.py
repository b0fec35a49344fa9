"""A recording in numbered segments, each a whole file: a power cut costs at most the segment that is being written.

The folder holds ``video-00000.mp4``, ``video-00001.mp4``, ... (with ``latents-00000.safetensors``, ... where latents
are kept too), the HLS playlist ``video.m3u8`` that players, browsers and FFmpeg open as one video, also while it grows,
and the index ``recording.json``, which says what belongs to the recording. A segment is entered there once it is on the
disk. Both lists are only appended to, so a segment costs the same after a week.

Each line of the index is a JSON object: the first describes the recording, and each further one is a segment. A last
line without its end is of a process that was killed while it wrote, and does not count. (Version 1 was one line, with
the segments in a list.)

FFmpeg's own HLS muxer would write the whole list again for each segment, and cannot begin in the middle of a recording.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Container, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from numpy.typing import ArrayLike

from echo_rt.errors import ConfigError, OutputError, TargetError
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import (
    Closing,
    Log,
    check_plain,
    close_all,
    names_in,
    raising,
    read_plain,
    reason,
    remove,
    write_whole,
)
from echo_rt.utils.checked_json import json_line, read_json
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.wording import counted

PLAYLIST_FILE = "video.m3u8"
_FORMER_PLAYLIST = "video.ffconcat"  # of recordings of version 1, whose segments all begin at 0 seconds
_VIDEO, _LATENTS, _INIT = "video-", "latents-", "init-"
# Names of our own in this folder only: a file that the index names can be removed.
_PIECE = r"\A(video-\d{5,12}\.mp4|init-[0-9a-f]{8}\.mp4|latents-\d{5,12}\.safetensors)\Z"
_HEAD = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MEDIA-SEQUENCE:0\n#EXT-X-PLAYLIST-TYPE:EVENT\n#EXT-X-INDEPENDENT-SEGMENTS\n"
INDEX_FILE = "recording.json"
_FORMAT, _VERSION = "echo-rt recording", 2
_MOST_BYTES = 2**30  # of an index: four years of ten-second segments

_Count = Annotated[int, Meta(ge=0, lt=2**53)]
_Some = Annotated[int, Meta(ge=1, lt=2**53)]
_File = Annotated[str, Meta(pattern=_PIECE)]


@dataclass(frozen=True)
class Segment:
    """One file: its frames within the whole video, its size in bytes, and the same of its latents where kept.

    ``init``: the file with the header of its codec, for players; None in recordings of earlier versions, whose segments
    have times of their own. ``notes``: what the recording's notes are from here on, where they changed.
    """

    file: _File
    first_frame: _Count
    frames: _Some
    size: _Some
    latents_file: _File | None = None
    latent_frames: _Count = 0
    latents_size: _Count = 0
    init: _File | None = None
    notes: dict[str, Any] | None = None

    @property
    def end_frame(self) -> int:
        """Number of the first frame after it."""
        return self.first_frame + self.frames

    @property
    def files(self) -> dict[str, int]:
        """Its files with their sizes."""
        latents = {} if self.latents_file is None else {self.latents_file: self.latents_size}
        return {self.file: self.size} | latents


@dataclass(frozen=True)
class _Format:
    format: Literal["echo-rt recording"]
    version: int


@dataclass
class RecordingIndex:
    """What a recording is, and its segments in order. ``notes``: plain JSON metadata of the program that records."""

    width: _Some
    height: _Some
    fps: Annotated[str, Meta(pattern=r"\A[1-9][0-9]{0,8}(/[1-9][0-9]{0,8})?\Z")]
    latent_shape: Annotated[tuple[_Some, ...], Meta(min_length=3, max_length=3)] | None
    notes: dict[str, Any]
    segments: list[Segment] = field(default_factory=list)

    @property
    def frame_rate(self) -> Fraction:
        """Frames a second."""
        return Fraction(self.fps)

    @property
    def frames(self) -> int:
        """Frames in all segments."""
        return self.segments[-1].end_frame if self.segments else 0

    @property
    def lines(self) -> list[bytes]:
        """Lines of the file: the recording, and each segment."""
        head = {name: value for name, value in vars(self).items() if name != "segments"}
        return [json_line({"format": _FORMAT, "version": _VERSION} | head), *map(json_line, self.segments)]

    @classmethod
    def read(cls, folder: str | Path) -> RecordingIndex:
        """Read the index in ``folder``; ``TargetError`` where it is absent, damaged or of another version."""
        path = Path(folder, INDEX_FILE)
        try:
            head, *lines = read_plain(path, _MOST_BYTES).split(b"\n")
        except FileNotFoundError:
            raise TargetError(f"{folder}: expected a recording in segments, found no {INDEX_FILE}") from None
        except OSError as error:
            raise TargetError(f"{path}: cannot read: {reason(error)}") from None
        what = f"{path}: expected the index of a recording in segments, found another or a damaged file"
        version = read_json(head, _Format, what, TargetError).version
        if not 1 <= version <= _VERSION:
            raise TargetError(f"{path}: expected version {_VERSION} or older, found {version}")
        index = read_json(head, cls, f"{path}: the index is damaged", TargetError)
        for number, line in enumerate(lines[:-1], 2):
            segment = read_json(line, Segment, f"{path}: the index is damaged: line {number}", TargetError)
            index.segments.append(segment)
            index.notes = index.notes if segment.notes is None else segment.notes
        end = 0
        for segment in index.segments:
            latents = (segment.latents_file, segment.latent_frames, segment.latents_size)
            kept = all(latents) if index.latent_shape is not None else not any(latents)
            if segment.first_frame != end or not kept:
                raise TargetError(f"{path}: the index is damaged: {segment.file} contradicts what comes before it")
            end = segment.end_frame
        return index

    def keep(self, folder: str | Path, frames: int) -> None:
        """Drop all but ``frames`` frames; ``TargetError`` unless a segment ends there and all files are as written."""
        kept = [segment for segment in self.segments if segment.end_frame <= frames]
        reached = kept[-1].end_frame if kept else 0
        if reached != frames:
            raise TargetError(
                f"{folder}: cannot resume at frame {frames}: the recording has {counted(self.frames, 'frame')}, "
                f"and the last segment boundary before it is at frame {reached}"
            )
        for path, size in ((Path(folder, name), size) for segment in kept for name, size in segment.files.items()):
            with raising(TargetError, f"{path}: expected {size} bytes"):
                found = check_plain(path)
            if found != size:
                raise TargetError(f"{path}: expected {size} bytes, found {found}")
        self.segments = kept


def check_free(
    folder: str | Path,
    expected: str = "a folder without a recording",
    advice: str = "resume it, name another folder, or remove it (no option replaces a recording)",
) -> None:
    """Raise ``TargetError`` where ``folder`` holds a recording with frames, or segments whose index is gone."""
    try:
        names = names_in(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise TargetError(f"{folder}: cannot be a folder to write into: {reason(error)}") from None
    files = sorted(name for name in names if re.match(_PIECE, name))
    frames = RecordingIndex.read(folder).frames if INDEX_FILE in names else None
    if frames or (frames is None and files):
        found = f"a recording of {counted(frames, 'frame')}" if frames else files[0]
        raise TargetError(f"{folder}: expected {expected}, found {found}; {advice}")


class SegmentedWriter(Closing):
    """Writes blocks of video to ``folder`` in segments of ``seconds`` of video, rounded up to whole blocks.

    Args:
        folder: made if absent; one that holds a recording with frames is refused.
        width, height, fps: as for :class:`VideoWriter`, like codec, crf and preset.
        seconds: of video in a segment, above 0; :meth:`cut` ends one earlier.
        latent_shape: channels, height and width of a latent frame, to keep the latents too.
        notes: plain JSON metadata for the index, for a resume; :attr:`notes` may be changed during the recording.

    Raises ``ConfigError`` for impossible sizes, ``TargetError`` for a folder that cannot be made or is taken, and
    ``OutputError`` when something cannot be written; everything that the index names is still whole then.
    ``segments_on_disk``, ``frames_on_disk``, ``latents_on_disk``: whole segments, and frames and latent frames in them.
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
        **encoding: Any,
    ) -> None:
        shape = None if latent_shape is None else tuple(latent_shape)
        rate = str(Fraction(fps).limit_denominator(1001))
        self._open(folder, seconds, encoding, RecordingIndex(width, height, rate, shape, dict(notes or {})))

    @classmethod
    def resume(cls, folder: str | Path, at_frame: int, *, seconds: float, **encoding: Any) -> SegmentedWriter:
        """Resume the recording in ``folder`` at frame ``at_frame`` and drop its frames from there on.

        A segment must begin or end there: where a snapshot was taken, :meth:`cut` ended one. ``TargetError`` where none
        does, and for an absent recording or one that lacks a file that its index names; then nothing is dropped.
        """
        RecordingIndex.read(folder)  # an absent folder is not made
        writer = cls.__new__(cls)
        writer._open(folder, seconds, encoding, None, at_frame)
        return writer

    def _open(
        self, folder: str | Path, seconds: float, encoding: dict[str, Any], new: RecordingIndex | None, at: int = 0
    ) -> None:
        """Claim the folder, begin or resume both lists, and remove files that do not belong to them."""
        if not seconds > 0:
            raise ConfigError(f"{folder}: a segment must have more than 0 seconds, got {seconds}")
        self.folder, self.seconds, self._encoding = Path(folder), seconds, encoding
        self._video: VideoWriter | None = None
        self._latents: LatentsWriter | None = None
        self._closed = False
        self._written: str | None = None  # the init, by this process: one that somebody removed is made again
        self._claim = FolderClaim(folder)
        try:
            if new is not None:
                check_free(folder)
            # Read here: from now on nobody else can change it.
            self.index = index = RecordingIndex.read(folder) if new is None else new
            index.keep(folder, at)
            segments = index.segments
            self.segments_on_disk, self.frames_on_disk = len(segments), index.frames
            self.latents_on_disk = sum(segment.latent_frames for segment in segments)
            self._noted = deepcopy(index.notes)
            self._former = any(segment.init is None for segment in segments)
            self._log = Log(self.folder / INDEX_FILE, b"".join(index.lines))
            self._begin_list(segments)
            index.segments = []  # those are on the disk; a week of them would not be small
            self._sweep({name for segment in segments for name in (*segment.files, segment.init)})
        except BaseException:
            self._claim.release()
            raise

    @property
    def playlist(self) -> Path:
        """Path of the list that plays the whole recording."""
        return self.folder / (_FORMER_PLAYLIST if self._former else PLAYLIST_FILE)

    @property
    def notes(self) -> dict[str, Any]:
        """The index's metadata; changes reach the disk with the next segment."""
        return self.index.notes

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
        if video.frames_encoded >= self.seconds * self.index.frame_rate:
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
        # What players load first; the same for every segment, unless the encoding changes with a resume.
        init = None if self._former else f"{_INIT}{zlib.crc32(video.header):08x}.mp4"
        if init is not None and init != self._written:
            write_whole(self.folder / init, video.header)
            self._written = init
        changed = self.notes != self._noted
        kept: dict[str, Any] = {}
        if latents is not None:
            kept = {
                "latents_file": latents.path.name,
                "latent_frames": latents.frames_on_disk,
                "latents_size": latents.size,
            }
        frames, notes = video.frames_on_disk, self.notes if changed else None
        segment = Segment(video.path.name, self.frames_on_disk, frames, video.size, **kept, init=init, notes=notes)
        self._log.append(json_line(segment))
        self._log.sync()
        self._noted = deepcopy(self.notes) if changed else self._noted
        self.segments_on_disk += 1
        self.frames_on_disk = segment.end_frame
        self.latents_on_disk += segment.latent_frames
        if segment.frames > self._longest * self.index.frame_rate:
            before = self._list
            self._begin_list(RecordingIndex.read(self.folder).segments)
            before.close()
        else:
            self._list.append(self._listed(segment).encode())

    def close(self) -> None:
        """End the last segment and both lists, and release the folder. May be called twice."""
        if self._closed:
            return
        self._closed = True
        end = partial(self._list.append, b"" if self._former else b"#EXT-X-ENDLIST\n")
        problems = close_all([self.cut, end, self._log.close, self._list.close, self._claim.release])
        if problems:
            raise problems[0]

    def _begin(self) -> VideoWriter:
        index, number = self.index, self.segments_on_disk
        try:
            self._video = VideoWriter(
                self.folder / f"{_VIDEO}{number:05}.mp4",
                index.width,
                index.height,
                index.frame_rate,
                fragmented=True,
                continues=None if self._former else self.frames_on_disk,
                **self._encoding,
            )
            if index.latent_shape is not None:
                file = self.folder / f"{_LATENTS}{number:05}.safetensors"
                self._latents = LatentsWriter(file, index.latent_shape)
        except BaseException as error:
            self.cut()  # or a later block would go into a segment without latents, which the index refuses
            if isinstance(error, TargetError):  # of the disk, or of a folder that is gone: no mistake in the request
                raise OutputError(str(error)) from None
            raise
        return self._video

    def _begin_list(self, segments: Sequence[Segment]) -> None:
        """Write the playlist whole. It promises how long a segment is at most, so a longer one begins it anew."""
        longest = max((segment.frames for segment in segments), default=0) / self.index.frame_rate
        self._longest = math.ceil(max(self.seconds, float(longest))) + 1
        self._init: str | None = None
        head = "ffconcat version 1.0\n" if self._former else f"{_HEAD}#EXT-X-TARGETDURATION:{self._longest}\n"
        self._list = Log(self.playlist, "".join([head, *map(self._listed, segments)]).encode())

    def _listed(self, segment: Segment) -> str:
        """The lines of the segment after those of the one before."""
        seconds = f"{float(segment.frames / self.index.frame_rate):.6f}"
        if self._former:
            return f"file {segment.file}\nduration {seconds}\n"
        lines = [f"#EXTINF:{seconds},", segment.file, ""]
        if segment.init != self._init:
            start = [] if self._init is None else ["#EXT-X-DISCONTINUITY"]
            lines = [*start, f'#EXT-X-MAP:URI="{segment.init}"', *lines]
        self._init = segment.init
        return "\n".join(lines)

    def _sweep(self, named: Container[str | None]) -> None:
        """Remove files of the recording that are not ``named``, and part files of killed processes."""
        with raising(OutputError, f"{self.folder}: cannot remove unused files"):
            for name in names_in(self.folder):
                if re.match(_PIECE, name) and name not in named:
                    remove(self.folder / name)
            if not self._former:
                remove(self.folder / _FORMER_PLAYLIST)
            for prefix in (_VIDEO, _LATENTS, _INIT, PLAYLIST_FILE, _FORMER_PLAYLIST, INDEX_FILE):
                self._claim.remove_parts(prefix)
