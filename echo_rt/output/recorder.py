"""Everything that one ``generate`` writes while it runs, opened, fed and closed as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.output.contact_sheet import ContactSheet
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.video import VideoWriter

if TYPE_CHECKING:
    from echo_rt.chunk import Chunk


class Recorder:
    """The video, and where they are asked for its latents and its contact sheet.

    Args:
        video, latents, contact_sheet: files; None for those that are not wanted.
        frame_size: width and height in pixels.
        fps: frames a second.
        latent_shape: channels, height and width of a latent frame.
        frame_limit: frames after which the video ends, in the middle of a block if need be; None for no end.
        metadata: what the latents' file says about their origin.
    """

    def __init__(
        self,
        video: Path,
        latents: Path | None,
        contact_sheet: Path | None,
        *,
        frame_size: tuple[int, int],
        fps: float,
        latent_shape: tuple[int, int, int],
        frame_limit: int | None,
        metadata: dict[str, str],
    ) -> None:
        self.frame_limit = frame_limit
        self.frames = 0
        self._writers: list[VideoWriter | LatentsWriter | ContactSheet] = []
        self._latents: LatentsWriter | None = None
        self._sheet: ContactSheet | None = None
        try:
            self._video = VideoWriter(video, *frame_size, fps)
            self._writers.append(self._video)
            if latents is not None:
                self._latents = LatentsWriter(latents, latent_shape, metadata=metadata)
                self._writers.append(self._latents)
            if contact_sheet is not None:
                self._sheet = ContactSheet(contact_sheet, fps=fps)
                self._writers.append(self._sheet)
        except BaseException:
            self.close()
            raise

    @property
    def full(self) -> bool:
        """Whether the video has all its frames."""
        return self.frame_limit is not None and self.frames >= self.frame_limit

    def write(self, chunk: Chunk) -> None:
        """Record one block: its frames up to the limit, its latents whole."""
        frames = chunk.frames
        if self.frame_limit is not None:
            frames = frames[: self.frame_limit - self.frames]
        # The latents first: they are what a video can be made from again.
        if self._latents is not None:
            self._latents.write(chunk.latents)
        if self._sheet is not None:
            self._sheet.write(frames)
        self._video.write(frames)
        self.frames += len(frames)

    def close(self) -> list[Exception]:
        """Close every file, whatever happens to the others, and return what went wrong."""
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:  # of whatever kind: the next file must be closed as well
                errors.append(error)
        return errors

    def report(self) -> dict[str, Any]:
        """What is on the disk after :meth:`close`, in plain JSON types."""
        files: dict[str, str] = {}
        if self._video.in_place:
            files["video"] = str(self._video.path)
        if self._latents is not None and self._latents.in_place:
            files["latents"] = str(self._latents.path)
        if self._sheet is not None and self._sheet.in_place:
            files["contact_sheet"] = str(self._sheet.path)
        frames = self._video.frames_on_disk if self._video.in_place else 0
        return {
            "frames": frames,
            "seconds": float(frames / self._video.fps),
            "size": [self._video.width, self._video.height],
            "video_fps": float(self._video.fps),
            "latent_frames": self._latents.frames_on_disk if self._latents and self._latents.in_place else 0,
            "files": files,
        }
