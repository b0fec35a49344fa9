"""Frames to write and a way to read a video back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


def _moving(first: int, count: int, width: int, height: int) -> NDArray[np.uint8]:
    """Smooth colours that move and tell frames apart: what H.264 keeps almost exactly."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = []
    for number in range(first, first + count):
        phase = 5 * number % 100
        red = 30 + 100 * columns // width + phase
        green = 30 + 100 * rows // height + phase
        blue = np.full_like(red, 60 + phase)
        frames.append(np.stack([red, green, blue], axis=-1))
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="session")
def moving() -> Callable[[int, int, int, int], NDArray[np.uint8]]:
    """``moving(first, count, width, height)``: uint8 [count, height, width, 3]."""
    return _moving


def _luma(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """BT.709's brightness, in the range that video uses."""
    return 16 + 219 / 255 * (frames @ np.array([0.2126, 0.7152, 0.0722]))


@pytest.fixture(scope="session")
def luma() -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """``luma(frames [n, height, width, 3])``: what ``Video.luma`` should be."""
    return _luma


class Video:
    """A decoded video and what its container says. ``luma``: [n, height, width]."""

    def __init__(self, path: Path) -> None:
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.size = (stream.codec_context.width, stream.codec_context.height)
            self.codec = stream.codec_context.name
            self.pixel_format = stream.codec_context.pix_fmt
            self.colours = (stream.codec_context.colorspace, stream.codec_context.color_primaries)
            self.rate = stream.average_rate
            self.seconds = container.duration / av.time_base
            self.times: list[float] = []
            self.key_frames: list[int] = []
            images = []
            for number, frame in enumerate(container.decode(video=0)):
                self.times.append(frame.time)
                if frame.key_frame:
                    self.key_frames.append(number)
                images.append(frame.to_ndarray(format="yuv420p")[: self.size[1]])
            self.luma = np.stack(images).astype(float)


@pytest.fixture(scope="session")
def read_video() -> type[Video]:
    return Video
