"""``recording.json``: which files make up a recording in segments, and which frames each of them holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from echo_rt.errors import TargetError
from echo_rt.utils.atomic_file import reason, write_whole

INDEX_FILE = "recording.json"
_FORMAT, _VERSION = "echo-rt recording", 1
_LATENT_AXES = 3


@dataclass(frozen=True)
class Segment:
    """One file: its frames within the whole video, its size in bytes, and the same of its latents where kept."""

    file: str
    first_frame: int
    frames: int
    size: int
    latents_file: str | None = None
    latent_frames: int = 0
    latents_size: int = 0

    @property
    def end_frame(self) -> int:
        """Number of the first frame after it."""
        return self.first_frame + self.frames


@dataclass
class RecordingIndex:
    """What a recording is, and its segments in order. ``notes``: plain JSON metadata of the program that records."""

    width: int
    height: int
    fps: Fraction
    latent_shape: tuple[int, ...] | None
    notes: dict[str, Any]
    segments: list[Segment] = field(default_factory=list)

    @staticmethod
    def path(folder: str | Path) -> Path:
        """Path of the index of the recording in ``folder``."""
        return Path(folder, INDEX_FILE)

    @property
    def frames(self) -> int:
        """Frames in all segments."""
        return self.segments[-1].end_frame if self.segments else 0

    def write(self, folder: str | Path) -> None:
        """Put it in place; raises ``OutputError``."""
        content = {"format": _FORMAT, "version": _VERSION} | dataclasses.asdict(self) | {"fps": str(self.fps)}
        write_whole(self.path(folder), json.dumps(content).encode())

    @classmethod
    def read(cls, folder: str | Path) -> RecordingIndex:
        """Read the index in ``folder``; ``TargetError`` where it is absent, damaged or of another version."""
        path = cls.path(folder)
        try:
            parsed = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise TargetError(f"{folder}: expected a recording in segments, found no {INDEX_FILE}") from None
        except OSError as error:
            raise TargetError(f"{path}: cannot read: {reason(error)}") from None
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict) or parsed.get("format") != _FORMAT:
            raise TargetError(f"{path}: expected the index of a recording in segments, found another or a damaged file")
        if parsed.get("version") != _VERSION:
            raise TargetError(f"{path}: expected version {_VERSION}, found {parsed.get('version')!r:.20}")
        try:
            shape = parsed["latent_shape"]
            index = cls(
                width=parsed["width"],
                height=parsed["height"],
                fps=Fraction(parsed["fps"]),
                latent_shape=None if shape is None else tuple(shape),
                notes=parsed["notes"],
                segments=[Segment(**entry) for entry in parsed["segments"]],
            )
            index._check()
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise TargetError(f"{path}: the index is damaged: entries contradict each other or are missing") from None
        return index

    def _check(self) -> None:
        """Raise ``ValueError`` for values that no writer writes."""
        counts = [self.width, self.height, *(self.latent_shape or ())]
        right = [
            self.fps > 0,
            isinstance(self.notes, dict),
            self.latent_shape is None or len(self.latent_shape) == _LATENT_AXES,
        ]
        end = 0
        for segment in self.segments:
            right.append(segment.first_frame == end)
            end = segment.end_frame
            counts += [segment.frames, segment.size]
            latents = (segment.latents_file, segment.latent_frames, segment.latents_size)
            if self.latent_shape is None:
                right.append(latents == (None, 0, 0))
            else:
                counts += latents[1:]
            # Names in this folder only: a file that is named here can be removed.
            names = [segment.file] if segment.latents_file is None else [segment.file, segment.latents_file]
            right += [isinstance(name, str) and Path(name).name == name for name in names]
        if not all(right) or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError

    def check_files(self, folder: str | Path, segments: Sequence[Segment]) -> None:
        """Raise ``TargetError`` unless every file of ``segments`` exists with the size that was written."""
        for segment in segments:
            for name, size in ((segment.file, segment.size), (segment.latents_file, segment.latents_size)):
                if name is None:
                    continue
                try:
                    found = Path(folder, name).stat().st_size
                except OSError as error:
                    raise TargetError(f"{Path(folder, name)}: expected {size} bytes, {reason(error)}") from None
                if found != size:
                    raise TargetError(f"{Path(folder, name)}: expected {size} bytes, found {found}")
