"""A video or a picture from disk, as the frames that a stream begins with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rt.errors import ConfigError
from echo_rt.output.video import load_av
from echo_rt.utils.wording import counted, first_line


class VideoFile:
    """The frames of the video, or the picture, in ``path``: iterate it, as often as you like, in memory for one frame.

    ``frames`` is how many there are, ``fps`` their rate, None where the file says none or there is one frame only.
    They are counted here, by decoding them all, so a file that is damaged anywhere is refused at once.

    Raises :class:`ConfigError` for a file that cannot be read, has no pictures, or more than ``most`` of them;
    :class:`BackendError` without PyAV.
    """

    def __init__(self, path: str | Path, *, most: int | None = None) -> None:
        self.path = Path(path)
        self._av = load_av()
        self.frames = 0
        self.fps: float | None = None
        for _ in self._decoded():
            self.frames += 1
            if most is not None and self.frames > most:
                raise ConfigError(f"{path}: expected a video of {counted(most, 'frame')} at most, got more")
        if not self.frames:
            raise ConfigError(f"{path}: expected a video or a picture, got a file with no frame in it")
        if self.frames == 1:
            self.fps = None

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Frame by frame, uint8 ``[1, H, W, 3]`` RGB, upright."""
        for frame in self._decoded():
            image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
            yield np.rot90(image, frame.rotation // 90)[None]  # degrees

    def _decoded(self) -> Iterator[Any]:
        try:
            with self._av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ConfigError(f"{self.path}: expected a video or a picture, got a file without either")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if not self.frames:  # while they are counted
                    self.fps = float(stream.average_rate) if stream.average_rate else None
                yield from container.decode(stream)
        except (OSError, ValueError, self._av.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ConfigError(f"{self.path}: expected a video or a picture, cannot read it: {reason}") from None
