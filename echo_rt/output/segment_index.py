"""``recording.json``: which files make up a recording in segments, and which frames each of them holds.

Each line is a JSON object: the first describes the recording, and each further one is a segment, appended once it is on
the disk. A last line without its end is of a process that was killed while it wrote, and does not count. (Version 1 was
one line, with the segments in a list.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from echo_rt.errors import TargetError
from echo_rt.utils.atomic_file import check_plain, place, raising, read_plain, reason
from echo_rt.utils.checked_json import json_line, read_json

INDEX_FILE = "recording.json"
_FORMAT, _VERSION = "echo-rt recording", 2
_MOST_BYTES = 2**30  # of an index: four years of ten-second segments

_Count = Annotated[int, Meta(ge=0, lt=2**53)]
_Some = Annotated[int, Meta(ge=1, lt=2**53)]
# Names of our own in this folder only: a file that is named here can be removed.
_File = Annotated[str, Meta(pattern=r"\A(video|latents|init)-[0-9a-f]{5,12}\.(mp4|safetensors)\Z")]


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

    @staticmethod
    def path(folder: str | Path) -> Path:
        """Path of the index of the recording in ``folder``."""
        return Path(folder, INDEX_FILE)

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
        path = cls.path(folder)
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

    def check_files(self, folder: str | Path, segments: Sequence[Segment]) -> None:
        """Raise ``TargetError`` unless every file of ``segments`` exists with the size that was written."""
        for path, size in ((Path(folder, name), size) for segment in segments for name, size in segment.files.items()):
            with raising(TargetError, f"{path}: expected {size} bytes"):
                check_plain(path)
                name, within = place(path)
                found = os.stat(name, dir_fd=within).st_size
            if found != size:
                raise TargetError(f"{path}: expected {size} bytes, found {found}")
